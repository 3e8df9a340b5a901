"""The only rounding in the package: symmetric and asymmetric uniform quantization.

Symmetric codes lie in `[-2^(b-1), 2^(b-1) - 1]` and stand for `scale * code`. Asymmetric codes lie in the same range
and stand for `scale * code + offset` with a floating-point offset: after centring and rotation zero is no special
value, so the grid need not contain it, and `offset` times the sum of a weight row's codes is one multiply-add.
Ties round to even (`torch.round`). NaN and infinity never become finite codes: a row that holds one gets a grid that
is not finite, and a value that is not finite gets the code NaN on any grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class QParams(NamedTuple):
    """Scale and offset of a grid, broadcastable to the values; `offset` is `None` for a symmetric grid."""

    scale: torch.Tensor
    offset: torch.Tensor | None


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of `bits` bits, e.g. `(-8, 7)` for 4."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def symmetric_qparams(values: torch.Tensor, bits: int, clip: torch.Tensor | float = 1.0) -> QParams:
    """Grid that covers `clip` times the largest magnitude of each row (last dimension).

    Args:
        values (`torch.Tensor` of shape `(..., n)`): Floating-point values.
        bits (`int`): 2 to 8.
        clip (`float` or `torch.Tensor` of shape `(..., 1)`, *optional*, defaults to 1.0): Share of the range kept.

    Returns:
        [`QParams`] with `scale` of shape `(..., 1)`; an all-zero row gets scale 1.
    """
    qmax = code_range(bits)[1] + 0.5  # half a step beyond the last code: range [-(qmax), qmax] is cut evenly
    scale = values.abs().amax(dim=-1, keepdim=True) * clip / qmax
    return QParams(torch.where(scale == 0, torch.ones_like(scale), scale), None)


def asymmetric_qparams(values: torch.Tensor, bits: int, clip: torch.Tensor | float = 1.0) -> QParams:
    """Grid from `clip * min` to `clip * max` of each row (last dimension); a constant row is represented exactly.

    Shapes as in [`symmetric_qparams`]; `offset` has the shape of `scale`.
    """
    low = values.amin(dim=-1, keepdim=True)
    high = values.amax(dim=-1, keepdim=True)
    middle, half = high / 2 + low / 2, (high / 2 - low / 2) * clip  # halved first: float16 would overflow
    scale = half / (((1 << bits) - 1) / 2)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # the lowest code, qmin, stands for the low end of the kept range
    return QParams(scale, middle - half - scale * code_range(bits)[0] * (half > 0))


def choose_qparams(values: torch.Tensor, bits: int, symmetric: bool, clip: torch.Tensor | float = 1.0) -> QParams:
    """[`symmetric_qparams`] or [`asymmetric_qparams`]."""
    return (symmetric_qparams if symmetric else asymmetric_qparams)(values, bits, clip)


def quantize(values: torch.Tensor, qparams: QParams, bits: int) -> torch.Tensor:
    """Codes of `values`, still in floating point so that callers choose the integer type.

    NaN and infinity get the code NaN, which [`pack`][optimum_freeact.numerics.packing.pack] refuses.
    """
    codes = round_codes(values, qparams, bits)
    return torch.where(values.isfinite(), codes, torch.nan)


def round_codes(values: torch.Tensor, qparams: QParams, bits: int) -> torch.Tensor:
    """[`quantize`] of values that are finite, or whose grid is their own row's (which then is not finite either)."""
    qmin, qmax = code_range(bits)
    if qparams.offset is None:
        return (values / qparams.scale).round_().clamp_(qmin, qmax)
    return (values - qparams.offset).div_(qparams.scale).round_().clamp_(qmin, qmax)


def dequantize(codes: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """The values that `codes` stand for."""
    values = codes.to(qparams.scale.dtype) * qparams.scale
    return values if qparams.offset is None else values + qparams.offset


def fake_quantize(
    values: torch.Tensor,
    bits: int,
    symmetric: bool,
    clip: torch.Tensor | float = 1.0,
    group_size: int | None = None,
) -> torch.Tensor:
    """Quantize and dequantize each row (last dimension), or each `group_size` entries of it, on a grid of its own.

    16 bits or more return `values` unchanged; `clip` is one number or of shape `(..., 1)`, the same for a row's groups.
    """
    if bits >= 16:
        return values
    if group_size is not None:
        clip = clip.unsqueeze(-2) if isinstance(clip, torch.Tensor) and clip.dim() else clip
        return fake_quantize(values.unflatten(-1, (-1, group_size)), bits, symmetric, clip).flatten(-2)
    qparams = choose_qparams(values, bits, symmetric, clip)
    return dequantize(round_codes(values, qparams, bits), qparams)


class _Round(torch.autograd.Function):
    """Rounding with the gradient of the identity (straight-through estimator, Bengio et al., 1308.3432)."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return torch.round(values)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return grad


def fake_quantize_ste(values: torch.Tensor, qparams: QParams, bits: int) -> torch.Tensor:
    """[`fake_quantize`] that is differentiable in `values`, `scale` and `offset`: rounding passes the gradient,
    clamping stops it, as FlatQuant and LSQ do.
    """
    qmin, qmax = code_range(bits)
    shifted = values if qparams.offset is None else values - qparams.offset
    codes = torch.clamp(_Round.apply(shifted / qparams.scale), qmin, qmax)
    # filled, not chosen from a number: that would be copied to a GPU, which no recorded graph allows
    return dequantize(codes.masked_fill(~shifted.isfinite(), torch.nan), qparams)
