"""GPTQ: rounding column by column, each column's error compensated by those that follow (2210.17323)."""

from __future__ import annotations

import logging

import torch

from optimum_freeact.numerics.affine import code_range
from optimum_freeact.rounding.rtn import RoundedWeight, search_scale


logger = logging.getLogger(__name__)

BLOCK = 64  # columns per lazy update; changes speed only


def inverse_factor(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse second moments; damping grows tenfold until it exists.

    Args:
        moments (`torch.Tensor` of shape `(in, in)`): Symmetric second moments of the inputs, float64.
        damping (`float`): Share of the mean diagonal added to the diagonal at first.

    Returns:
        `torch.Tensor` of shape `(in, in)`, float64, upper triangular U with U^T U = (moments + damping)^-1.

    Raises:
        `ValueError`: if the moments are not finite.
    """
    if not torch.isfinite(moments).all():
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
            if torch.isfinite(upper).all():
                return upper
        logger.debug("GPTQ damping %.1e too small, raised tenfold.", share)
        share = max(share, 1e-8) * 10


def gptq(
    weight: torch.Tensor,
    moments: torch.Tensor,
    bits: int,
    group_size: int,
    damping: float = 0.01,
    clip: float | None = None,
) -> RoundedWeight:
    """Round a weight so that the error of its output on inputs with the given second moments is small.

    Columns are processed in the order of falling input energy (the paper's `act_order`), which needs one scale per
    row; with groups the natural order is kept.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): Floating point; not modified.
        moments (`torch.Tensor` of shape `(in, in)`): Second moments of the inputs, float64.
        bits (`int`): 4 or 8.
        group_size (`int`): Divides `in`; `in` itself means one scale per output channel.
        damping (`float`, *optional*, defaults to 0.01): See [`inverse_factor`].
        clip (`float`, *optional*): Fixed clip ratio of the scales; searched by default, columns weighted by energy.

    Returns:
        [`RoundedWeight`] in the columns' original order.
    """
    n = weight.shape[1]
    per_channel = group_size == n
    order = torch.argsort(moments.diagonal(), descending=True) if per_channel else torch.arange(n)
    order = order.to(weight.device)
    factor = inverse_factor(moments[order][:, order], damping).to(torch.float32)
    work = weight.float()[:, order]
    energy = moments.diagonal()[order].float().view(-1, group_size)
    scale = search_scale(work.unflatten(-1, (-1, group_size)), bits, energy, clip)  # (out, groups, 1)
    codes = _round_columns(work.mT.contiguous(), scale.squeeze(-1).mT.contiguous(), factor, bits, group_size)
    restored = torch.empty_like(work)
    restored[:, order] = codes.mT
    return RoundedWeight(restored.unflatten(-1, (-1, group_size)), scale)


def _round_columns(
    work: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, bits: int, group_size: int
) -> torch.Tensor:
    """Codes of the columns, which lie in the rows of `work` `(in, out)` so that each is contiguous; `work` is used up."""
    qmin, qmax = code_range(bits)
    codes = torch.empty_like(work)
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        errors = torch.empty_like(work[start:stop])
        for i in range(start, stop):
            step = scale[i // group_size]
            torch.clamp(torch.round(work[i] / step), qmin, qmax, out=codes[i])
            torch.div(work[i] - codes[i] * step, factor[i, i], out=errors[i - start])
            work[i:stop].addr_(factor[i, i:stop], errors[i - start], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].mT, errors, alpha=-1)
    return codes
