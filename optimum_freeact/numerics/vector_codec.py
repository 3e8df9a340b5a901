"""Vectors as rows of bytes: asymmetric 4- or 8-bit codes followed by the grid they belong to.

A row is self-contained, so rows can be sliced, reordered and concatenated like the vectors that they stand for:

    | codes, two per byte (4 bits) or one (8 bits) | scale, 2 bytes | low end, 2 bytes |

Scale and low end are stored in a two-byte floating-point type and rounded *outward*, so that the stored grid always
covers the vector and no value is off by more than half of the stored scale. A vector that holds NaN or infinity, or
leaves the range of the storage type, decodes to NaN in every entry.
"""

from __future__ import annotations

import torch

from optimum_freeact.numerics.affine import QParams, code_range, dequantize, quantize
from optimum_freeact.numerics.packing import bytes_per_group, pack, unpack


GRID_BYTES = 4  # scale and low end, two bytes each


def row_bytes(size: int, bits: int) -> int:
    """Bytes of one encoded vector of `size` values, e.g. 36 for 64 values of 4 bits (bfloat16: 128)."""
    return bytes_per_group(size, bits, torch.uint8) + GRID_BYTES


def grid_dtype(dtype: torch.dtype) -> torch.dtype:
    """The two-byte type that holds the grid of vectors in `dtype`: their own type if it has two bytes, else float16."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _round_down(values: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """The largest number of the two-byte type `storage` that is not above each value; NaN stays NaN."""
    rounded = values.to(storage)
    bits = rounded.view(torch.int16)  # sign and magnitude: one step down is -1 above zero and +1 below
    below = (bits + torch.where(bits > 0, -1, 1).to(torch.int16)).view(storage)
    return torch.where(rounded.to(values.dtype) > values, below, rounded)


def outward_grid(values: torch.Tensor, bits: int, storage: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and low end of the smallest grid in `storage` that covers each vector.

    Args:
        values (`torch.Tensor` of shape `(..., size)`): float32 or float64.
        bits (`int`): 4 or 8.
        storage (`torch.dtype`): `torch.float16` or `torch.bfloat16`.

    Returns:
        Two `torch.Tensor` in `storage` of shape `(..., 1)`. A constant vector that `storage` holds gets scale 1.
    """
    low = _round_down(values.amin(dim=-1, keepdim=True), storage)
    scale = (values.amax(dim=-1, keepdim=True) - low.to(values.dtype)) / ((1 << bits) - 1)
    scale = -_round_down(-scale, storage)
    return torch.where(scale == 0, torch.ones_like(scale), scale), low


def _qparams(scale: torch.Tensor, low: torch.Tensor, bits: int, dtype: torch.dtype) -> QParams:
    scale = scale.to(dtype)
    return QParams(scale, low.to(dtype) - code_range(bits)[0] * scale)


def encode(values: torch.Tensor, bits: int, storage: torch.dtype) -> torch.Tensor:
    """Encode vectors.

    Args:
        values (`torch.Tensor` of shape `(..., size)`): float32 or float64, the arithmetic's type.
        bits (`int`): 4 or 8.
        storage (`torch.dtype`): Type of scale and low end, `torch.float16` or `torch.bfloat16`.

    Returns:
        `torch.Tensor` (`uint8`) of shape `(..., row_bytes(size, bits))`.
    """
    scale, low = outward_grid(values, bits, storage)
    codes = quantize(values, _qparams(scale, low, bits, values.dtype), bits)
    codes = codes.nan_to_num(0.0).to(torch.int8)  # a vector with a NaN code has a NaN or infinite grid: decodes to NaN
    packed = pack(codes.reshape(-1, 1, values.shape[-1]), bits).reshape(*values.shape[:-1], -1)
    return torch.cat((packed, scale.view(torch.uint8), low.view(torch.uint8)), dim=-1)


def decode(rows: torch.Tensor, bits: int, size: int, storage: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of [`encode`] up to rounding: vectors of shape `(..., size)` in `dtype` (float32 or float64)."""
    packed, scale, low = rows.split((rows.shape[-1] - GRID_BYTES, 2, 2), dim=-1)
    grid = _qparams(scale.contiguous().view(storage), low.contiguous().view(storage), bits, dtype)
    codes = unpack(packed.reshape(-1, 1, packed.shape[-1]), bits, size, storage).reshape(*rows.shape[:-1], size)
    return dequantize(codes, grid)
