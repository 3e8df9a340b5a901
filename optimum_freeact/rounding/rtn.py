"""Scales of a weight matrix by a search over clip ratios, and rounding to the nearest code."""

from __future__ import annotations

from typing import NamedTuple

import torch

from optimum_freeact.numerics.affine import QParams, quantize, round_codes, symmetric_qparams


# Share of a row's largest magnitude that the grid covers. For Gaussian rows of 576 to 4864 weights the 4-bit optimum
# lies between 0.7 and 0.85; the grid spans it with steps finer than the flat bottom of the error curve.
CLIP_GRID = (1.0, 0.95, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.65, 0.6)


MAX_GROUP_SCALE = 255  # one byte a group


class RoundedWeight(NamedTuple):
    """Integer codes of a weight and what they are multiplied with.

    Args:
        codes (`torch.Tensor` of shape `(out, groups, group_size)`): Integers in a floating dtype.
        scale (`torch.Tensor` of shape `(out, 1, 1)`): One number per output row.
        group_scale (`torch.Tensor` of shape `(out, groups, 1)`, *optional*): Integers from 1 to 255 in a floating dtype, by
            which a group's scale is larger than `scale`; `None` where a row is one group.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    group_scale: torch.Tensor | None = None

    @property
    def steps(self) -> torch.Tensor:
        """Effective scale of each group, shape `(out, groups, 1)`."""
        return self.scale if self.group_scale is None else self.scale * self.group_scale

    @property
    def values(self) -> torch.Tensor:
        """What the codes stand for, shape `(out, groups, group_size)`."""
        return self.codes * self.steps


def split_scale(scale: torch.Tensor, is_zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales of groups as one float a row times one byte a group; the largest group of each row keeps its scale.

    Args:
        scale (`torch.Tensor` of shape `(out, groups, 1)`): Positive.
        is_zero (`torch.Tensor` of shape `(out, groups, 1)`): Groups without a weight that is not zero: any scale does.

    Returns:
        `torch.Tensor` of shape `(out, 1, 1)` and, with several groups, bytes of shape `(out, groups, 1)` in the same dtype.
    """
    if scale.shape[1] == 1:
        return scale, None
    largest = torch.where(is_zero, 0.0, scale).amax(1, keepdim=True)
    row = torch.where(largest == 0, torch.ones_like(largest), largest / MAX_GROUP_SCALE)
    return row, torch.where(is_zero, 1.0, (scale / row).round_().clamp_(1, MAX_GROUP_SCALE))


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
    scale, bytes_ = split_scale(search_scale(grouped, bits, clip=clip), (grouped == 0).all(-1, keepdim=True))
    steps = scale if bytes_ is None else scale * bytes_
    return RoundedWeight(quantize(grouped, QParams(steps, None), bits), scale, bytes_)
