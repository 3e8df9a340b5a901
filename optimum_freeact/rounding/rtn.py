"""Scales of a weight matrix by a search over clip ratios, and rounding to the nearest code."""

from __future__ import annotations

from typing import NamedTuple

import torch

from optimum_freeact.numerics.affine import QParams, quantize, round_codes, symmetric_qparams


# Share of a row's largest magnitude that the grid covers. For Gaussian rows of 576 to 4864 weights the 4-bit optimum
# lies between 0.7 and 0.85; the grid spans it with steps finer than the flat bottom of the error curve.
CLIP_GRID = (1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.65, 0.6)


class RoundedWeight(NamedTuple):
    """Integer codes (floating dtype) of shape `(out, groups, group_size)` and scales of shape `(out, groups, 1)`."""

    codes: torch.Tensor
    scale: torch.Tensor


def search_scale(
    weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None, clip: float | torch.Tensor | None = None
) -> torch.Tensor:
    """Symmetric scale of each row that minimises the (weighted) squared rounding error over [`CLIP_GRID`].

    Args:
        weight (`torch.Tensor` of shape `(out, groups, group_size)`): Rows, floating point.
        bits (`int`): 4 or 8.
        importance (`torch.Tensor` of shape `(groups, group_size)`, *optional*): Weight of each column's error, e.g. the
            second moments of its input. `None` counts all columns alike.
        clip (`float` or `torch.Tensor` of shape `(out, groups, 1)`, *optional*): Use this instead of searching.

    Returns:
        `torch.Tensor` of shape `(out, groups, 1)`.
    """
    if clip is not None:
        return symmetric_qparams(weight, bits, clip).scale
    best_error = torch.full_like(weight[..., :1], float("inf"))
    best_scale = torch.ones_like(best_error)
    for ratio in CLIP_GRID:
        qparams = symmetric_qparams(weight, bits, ratio)
        error = round_codes(weight, qparams, bits).mul_(qparams.scale).sub_(weight).square_()
        error = (error if importance is None else error.mul_(importance)).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, qparams.scale, best_scale)
    return best_scale


def round_to_nearest(
    weight: torch.Tensor, bits: int, group_size: int, clip: float | torch.Tensor | None = None
) -> RoundedWeight:
    """Round each group of `group_size` columns of each row to the nearest code.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): Floating point; not modified.
        bits (`int`): 4 or 8.
        group_size (`int`): Divides `in`; `in` itself means one scale per output channel.
        clip (`float` or `torch.Tensor` of shape `(out, groups, 1)`, *optional*): Fixed ratio; searched by default.
    """
    grouped = weight.unflatten(-1, (-1, group_size))
    scale = search_scale(grouped, bits, clip=clip)
    return RoundedWeight(quantize(grouped, QParams(scale, None), bits), scale)
