"""Codes to bytes and back.

A packed weight is always `uint8` with three dimensions, `(out_features, n_groups, bytes_per_group)`. No plain weight
has three, so a program that does not know the format fails with a shape mismatch instead of reading nonsense.

4 bits: two codes in a byte, the even column in the low nibble, each code stored as `code + 8`:

    codes    -8  7 | 0 -1          column 0 1 | 2 3
    nibbles   0 15 | 8  7
    byte     0xF0    0x78          (high nibble first)

8 bits: one byte each, stored as `code + 128`. 16 bits: the raw bytes of the floating-point values.
"""

from __future__ import annotations

import torch

from optimum_freeact.numerics.finite import all_finite


def _check_bits(bits: int) -> None:
    if bits not in (4, 8, 16):
        raise ValueError(f"codes are packed in 4, 8 or 16 bits, got {bits!r}.")


def bytes_per_group(group_size: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes that one group of `group_size` weights takes; `dtype` matters for 16 bits (unquantized) only."""
    _check_bits(bits)
    if bits == 4:
        return (group_size + 1) // 2
    return group_size if bits == 8 else group_size * dtype.itemsize


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes.

    Args:
        codes (`torch.Tensor` of shape `(out_features, n_groups, group_size)`):
            Integer-valued, any dtype, in the signed range of `bits`; for 16 bits the floating-point weights themselves.
        bits (`int`): 4, 8 or 16.

    Returns:
        `torch.Tensor` (`uint8`) of shape `(out_features, n_groups, bytes_per_group)`; an odd group is padded by one
        zero code.

    Raises:
        `ValueError`: if `bits` is not allowed, or floating-point `codes` hold NaN or infinity (4 and 8 bits).
    """
    _check_bits(bits)
    if bits == 16:
        return codes.contiguous().view(torch.uint8)
    if codes.is_floating_point() and not all_finite(codes):
        raise ValueError(
            f"{int((~codes.isfinite()).sum())} of {codes.numel()} codes are NaN or infinite and have no {bits}-bit form; "
            "the values that were quantized, or their scales, are not finite."
        )
    shifted = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 8:
        return shifted.contiguous()
    if shifted.shape[-1] % 2:
        shifted = torch.nn.functional.pad(shifted, (0, 1), value=8)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpack(packed: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of [`pack`]: `int8` codes, or for 16 bits the values in `dtype`, shape `(out, n_groups, group_size)`."""
    _check_bits(bits)
    if bits == 16:
        return packed.contiguous().view(dtype)
    if bits == 8:
        return (packed.to(torch.int16) - 128).to(torch.int8)
    low = (packed & 0xF).to(torch.int8)
    high = (packed >> 4).to(torch.int8)
    return (torch.stack((low, high), dim=-1).flatten(-2)[..., :group_size] - 8).contiguous()
