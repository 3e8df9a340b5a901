"""Rows or columns of numbers in one byte each, symmetric, with a scale for every group of a row.

Groups keep a few large entries (the attention sink's) from taking the precision of all others.
"""

from __future__ import annotations

import torch


SIZES = (64, 48, 32, 24, 16)


def group_size(n: int) -> int:
    """Numbers that share a scale in rows of `n`: the largest of a few sizes that divides it, else the whole row."""
    return next((size for size in SIZES if n % size == 0), n)


def to_bytes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows `(..., n)`: `int8` of the same shape, and `bfloat16` of shape `(..., groups)`.

    No number is off by more than half of its group's scale, which is the group's peak over 127 (half a per cent more where
    the scale was rounded down to bfloat16: then the peak itself is cut).
    """
    groups = rows.unflatten(-1, (-1, group_size(rows.shape[-1])))
    scale = (groups.abs().amax(-1) / 127).to(torch.bfloat16)
    step = torch.where(scale == 0, torch.ones_like(scale), scale).to(rows.dtype).unsqueeze(-1)
    return torch.round(groups / step).clamp(-127, 127).flatten(-2).to(torch.int8), scale


def from_bytes(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The rows that [`to_bytes`] stored, in `dtype`."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1)).to(dtype)
    return (groups * scale.to(dtype).unsqueeze(-1)).flatten(-2)


def column_codes(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes of a matrix and a scale per column; a relative error of about 1e-4 in energy."""
    scale = matrix.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return torch.round(matrix / scale).to(torch.int8), scale
