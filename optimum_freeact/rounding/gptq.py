"""GPTQ: rounding column by column, each column's error compensated by those that follow (2210.17323)."""

from __future__ import annotations

import logging

import torch

from optimum_freeact.numerics.affine import QParams, quantize
from optimum_freeact.rounding.rtn import RoundedWeight, search_scale


logger = logging.getLogger(__name__)

BLOCK = 128  # columns per lazy update, as in the paper; changes speed only


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
        lower, failed = torch.linalg.cholesky_ex(moments + share * mean * eye)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
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
    work = weight.float()[:, order].clone()
    energy = moments.diagonal()[order].float().view(-1, group_size)
    scale = search_scale(work.unflatten(-1, (-1, group_size)), bits, energy, clip)  # (out, groups, 1)
    codes = torch.empty_like(work)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = torch.empty_like(work[:, start:stop])
        for column in range(start, stop):
            row = factor[column, column:stop]
            value = work[:, column : column + 1]
            qparams = QParams(scale[:, column // group_size], None)
            codes[:, column : column + 1] = quantize(value, qparams, bits)
            error = (value - codes[:, column : column + 1] * qparams.scale) / row[0]
            work[:, column:stop] -= error * row
            errors[:, column - start : column - start + 1] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return RoundedWeight(restored.unflatten(-1, (-1, group_size)), scale)
