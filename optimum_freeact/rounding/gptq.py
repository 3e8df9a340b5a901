"""GPTQ: rounding column by column, each column's error compensated by those that follow (2210.17323), then refined.

GPTQ decides each code once, when only the columns before it are rounded. Passes of coordinate descent afterwards give each
code a second choice, with all others rounded: the error on the calibration moments can only fall (as in QuIP, 2307.13304,
and CDQuant, 2406.17542).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from optimum_freeact.kernels.dispatch import triton_obstacle, wanted
from optimum_freeact.numerics.affine import code_range
from optimum_freeact.numerics.finite import all_finite
from optimum_freeact.rounding.rtn import MAX_GROUP_SCALE, RoundedWeight, search_scale, split_scale


logger = logging.getLogger(__name__)

LEAF = 8  # columns rounded one by one before their error is spread; changes speed only
BLOCK = 64  # columns per lazy update of coordinate descent; changes speed only


def inverse_factor(moments: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor of the damped inverse second moments; damping grows tenfold until it exists.

    Args:
        moments (`torch.Tensor` of shape `(in, in)`): Symmetric second moments of the inputs, float64.
        damping (`float`): Share of the mean diagonal added to the diagonal at first.

    Returns:
        `torch.Tensor` of shape `(in, in)`, float64, upper triangular U with U^T U = (moments + added)^-1, and `added`, what
        was added to the diagonal in the end.

    Raises:
        `ValueError`: if the moments are not finite.
    """
    if not all_finite(moments):
        raise ValueError("GPTQ got second moments that are not finite: the calibration inputs hold NaN or inf.")
    mean = moments.diagonal().mean()
    mean = mean if mean > 0 else torch.ones_like(mean)
    eye = torch.eye(moments.shape[0], dtype=moments.dtype, device=moments.device)
    share = damping
    while True:
        # With the order reversed, moments = R R^T with R upper triangular, and R^-1 is the factor wanted: one Cholesky
        # and one triangular inverse, where the usual three steps take five times as long on a CPU.
        lower, failed = torch.linalg.cholesky_ex((moments + share * mean * eye).flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if all_finite(upper):
                return upper, share * mean
        logger.debug("GPTQ damping %.1e too small, raised tenfold.", share)
        share = max(share, 1e-8) * 10


def gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    bits: int,
    group_size: int,
    damping: float = 0.01,
    clip: float | None = None,
    passes: int = 0,
    by_energy: bool = True,
    refit: bool = False,
) -> RoundedWeight:
    """Round a weight so that the error of its output on inputs with the given second moments is small.

    Columns are processed in the order of falling input energy (the paper's `act_order`). Scales are chosen first, each for
    its own group of neighbouring columns, so that any order will do.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): Floating point; not modified.
        moments (`torch.Tensor` of shape `(in, in)`): Second moments of the inputs, float64.
        bits (`int`): 4 or 8.
        group_size (`int`): Divides `in`; `in` itself means one scale per output channel.
        damping (`float`, *optional*, defaults to 0.01): See [`inverse_factor`].
        clip (`float`, *optional*): Fixed clip ratio of the scales; searched by default, columns weighted by energy.
        passes (`int`, *optional*, defaults to 0): Of coordinate descent after GPTQ; 0 is GPTQ itself.
        by_energy (`bool`, *optional*, defaults to `True`): `False` processes the columns as they come.
        refit (`bool`, *optional*, defaults to `False`): Fit the groups' scales to the codes in the end, and give every code
            another choice on the grid that comes of it.

    Returns:
        [`RoundedWeight`] in the columns' original order.
    """
    n = weight.shape[1]
    grouped = weight.float().unflatten(-1, (-1, group_size))
    scale = search_scale(grouped, bits, moments.diagonal().float().view(-1, group_size), clip)  # (out, groups, 1)
    scale, bytes_ = split_scale(scale, (grouped == 0).all(-1, keepdim=True))
    order = torch.argsort(moments.diagonal(), descending=True) if by_energy else torch.arange(n)
    order = order.to(weight.device)
    moments = moments[order][:, order]
    factor, added = inverse_factor(moments, damping)
    steps = scale if bytes_ is None else scale * bytes_
    steps = steps.squeeze(-1).mT.contiguous()[order // group_size]  # (in, out)
    original = weight.float()[:, order].mT.contiguous()
    moments = (moments + added * torch.eye(n, dtype=moments.dtype, device=moments.device)).float()
    codes = _codes(original, steps.contiguous(), factor.float(), moments, code_range(bits), passes)
    if refit and bytes_ is not None:
        bytes_ = refit_groups(codes, original, scale, bytes_, moments, order // group_size)
        steps = (scale * bytes_).squeeze(-1).mT.contiguous()[order // group_size]
        codes = _codes(original, steps.contiguous(), factor.float(), moments, code_range(bits), 1, codes)
    restored = torch.empty_like(weight, dtype=torch.float32)
    restored[:, order] = codes.mT
    return RoundedWeight(restored.unflatten(-1, (-1, group_size)), scale, bytes_)


_failed: list[str] = []  # why the loops on a GPU are not used in this process


def column_loops(device: torch.device) -> tuple[Callable, Callable]:
    """The column loops of GPTQ and of coordinate descent for a device: in Triton where it serves, else in torch."""
    if device.type == "cuda" and not _failed and wanted() != "torch" and triton_obstacle(device.index) is None:
        from optimum_freeact.kernels import gptq_triton

        return gptq_triton.round_columns, gptq_triton.descend
    return _round_columns, _descend


def refit_groups(
    codes: torch.Tensor,
    original: torch.Tensor,
    scale: torch.Tensor,
    group_scale: torch.Tensor,
    moments: torch.Tensor,
    group_of: torch.Tensor,
) -> torch.Tensor:
    """Bytes of the groups' scales that fit given codes best, one group after the other: the error only falls.

    With E what is lost, q a group's codes and M the moments, the step that is best for the others as they are is the own one
    plus q^T M E / q^T M q.

    Args:
        codes, original (`torch.Tensor` of shape `(in, out)`): Columns in rows, in any order.
        scale (`torch.Tensor` of shape `(out, 1, 1)`), group_scale (`torch.Tensor` of shape `(out, groups, 1)`): As in
            `rounding.rtn.RoundedWeight`.
        moments (`torch.Tensor` of shape `(in, in)`): In the same order.
        group_of (`torch.Tensor` of shape `(in,)`): Group of each column.

    Returns:
        `torch.Tensor` of shape `(out, groups, 1)`; signs are kept.
    """
    row, found = scale.flatten(), group_scale.squeeze(-1).mT.clone()  # (out,), (groups, out)
    gradient = moments @ (original - codes * (row * found)[group_of])
    for group in range(len(found)):
        columns = (group_of == group).nonzero().flatten()
        own, reach = codes[columns], moments[:, columns]
        pull = (own * gradient[columns]).sum(0)
        weight = (own * (reach[columns] @ own)).sum(0)
        wanted = found[group] + torch.where(weight > 0, pull / (weight * row).clamp_min(1e-30), 0.0)
        sign = found[group].sign()
        new = sign * (wanted * sign).round_().clamp_(1, MAX_GROUP_SCALE)
        gradient.addmm_(reach, own * ((new - found[group]) * row), alpha=-1)
        found[group] = new
    return found.mT.unsqueeze(-1).contiguous()


def _codes(
    original, steps, factor, moments, limits: tuple[int, int], passes: int, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes `(in, out)` of the columns in the rows of `original`, from GPTQ or from given ones; a kernel that fails is
    replaced for good.
    """

    def run(round_all: Callable, descend: Callable) -> torch.Tensor:
        codes = round_all(original.clone(), steps, factor, limits) if start is None else start.clone()
        for _ in range(passes):
            descend(codes, original, steps, moments, limits)
        return codes

    try:  # the import too: a kernel that is not there is no reason to end a calibration
        return run(*column_loops(original.device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises
        if original.device.type == "cpu" and column_loops(original.device)[0] is _round_columns:
            raise  # there is no other way
        _failed.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
        logger.warning("GPTQ's kernel failed (%s): plain torch takes its place, at a loss of speed.", _failed[0])
    return run(_round_columns, _descend)


def _round_columns(
    work: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor, limits: tuple[int, int]
) -> torch.Tensor:
    """Codes of the columns, which lie in the rows of `work` `(in, out)` so that each is contiguous; `work` is used up.

    The columns are halved recursively: the first half's errors reach the second in one matrix product.
    """
    codes, errors = torch.empty_like(work), torch.empty_like(work)

    def leaf(start: int, stop: int) -> None:
        for i in range(start, stop):
            torch.clamp(torch.round(work[i] / steps[i]), *limits, out=codes[i])
            torch.div(work[i] - codes[i] * steps[i], factor[i, i], out=errors[i])
            if i + 1 < stop:
                work[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i], alpha=-1)

    def half(start: int, stop: int) -> None:
        if stop - start <= LEAF:
            return leaf(start, stop)
        middle = (start + stop) // 2
        half(start, middle)
        work[middle:stop].addmm_(factor[start:middle, middle:stop].mT, errors[start:middle], alpha=-1)
        half(middle, stop)

    half(0, len(work))
    return codes


def _descend(
    codes: torch.Tensor, original: torch.Tensor, steps: torch.Tensor, moments: torch.Tensor, limits: tuple[int, int]
) -> None:
    """One pass of coordinate descent on tr(E M E^T) over `codes` `(in, out)`, in place; E is what is lost.

    With all other codes fixed, the best value of a code is its own plus its share of the gradient, M_i E / M_ii, rounded.
    The gradient is brought up to date for all columns after each block, within the block after each column.
    """
    gradient = moments @ (original - codes * steps)
    for start in range(0, len(codes), BLOCK):
        stop = min(start + BLOCK, len(codes))
        own, before = gradient[start:stop], codes[start:stop].clone()
        for i in range(start, stop):
            now = codes[i] * steps[i]
            torch.clamp(torch.round((now + own[i - start] / moments[i, i]) / steps[i]), *limits, out=codes[i])
            change = codes[i] * steps[i] - now
            own[i - start + 1 :].addr_(moments[i, i + 1 : stop], change, alpha=-1)
        change = (codes[start:stop] - before) * steps[start:stop]
        gradient[stop:].addmm_(moments[stop:, start:stop], change, alpha=-1)
