"""What the kernels compute, in plain torch: the specification that each is tested against.

Between the kernels codes have an order of their own: in each row the even columns first, then the odd ones. A byte of a
packed weight holds an even column in its low nibble and the odd one after it in its high nibble, so that the two halves
of a row of codes meet the two nibbles of a row of bytes without any shuffle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from optimum_freeact.numerics.affine import choose_qparams, quantize
from optimum_freeact.numerics.packing import unpack
from optimum_freeact.transforms.affine_map import InputMap, pick


class Rows(NamedTuple):
    """Rounded rows as kernels hand them on.

    Args:
        codes (`int8`, shape `(n, d)`): Even columns, then odd ones.
        stats (`float32`, shape `(3, n)`): Scale, offset and sum of the codes of each row.
        branch (`float32`, shape `(n, padded r)`, *optional*): High-precision coordinates, zeros where padded.
    """

    codes: torch.Tensor
    stats: torch.Tensor
    branch: torch.Tensor | None


def split_columns(codes: torch.Tensor) -> torch.Tensor:
    """Columns in natural order -> even ones before odd ones."""
    return torch.cat((codes[..., 0::2], codes[..., 1::2]), dim=-1)


def join_columns(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of [`split_columns`]."""
    even, odd = codes.chunk(2, dim=-1)
    return torch.stack((even, odd), dim=-1).flatten(-2)


def round_rows(
    x: torch.Tensor,
    types: torch.Tensor | None,
    found: InputMap,
    clip: torch.Tensor,
    bits: int,
    symmetric: bool,
    branch: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Centre, scale, split off the branch, rotate and round rows `x` of shape `(n, d)`.

    Args:
        x (`torch.Tensor` of shape `(n, d)`): Any floating dtype.
        types (`torch.Tensor` of shape `(n,)`, *optional*): Token types; `None` for type 0 throughout.
        found ([`InputMap`]): The map in `dtype`.
        clip (`torch.Tensor` of shape `(n_types,)`): Share of the range kept.
        bits, symmetric: The grid.
        branch (`int`, *optional*): Width to which the branch is padded.
        dtype (`torch.dtype`, *optional*, defaults to float32): Arithmetic.
    """
    z, p = found.to(dtype).apply(x.to(dtype), types)
    qparams = choose_qparams(z, bits, symmetric, pick(clip.to(dtype).unsqueeze(-1), types))
    codes = quantize(z, qparams, bits)
    total = codes.sum(-1).nan_to_num(0.0)
    offset = torch.zeros_like(qparams.scale) if qparams.offset is None else qparams.offset
    stats = torch.stack((qparams.scale.squeeze(-1), offset.squeeze(-1), total)).to(dtype)
    if p is not None:
        p = torch.nn.functional.pad(p, (0, branch - p.shape[-1]))
    return Rows(split_columns(codes.nan_to_num(0.0).to(torch.int8)), stats, p)


class Weight(NamedTuple):
    """What a quantized linear stores, as the kernels read it.

    Args:
        packed (`uint8`, shape `(m, d / 2)`): Nibbles of code + 8.
        qscale (`float32`, shape `(m,)`): Scale of each output channel.
        row_sum (`int32`, shape `(m,)`): Sum of each row's codes.
        low_rank (`int8`, shape `(m, r)`, *optional*) and low_rank_scale (`float32`, shape `(r,)`, *optional*): The branch.
        type_bias (`float32`, shape `(n_means or 1, m)`, *optional*): Output bias of each token type.
    """

    packed: torch.Tensor
    qscale: torch.Tensor
    row_sum: torch.Tensor
    low_rank: torch.Tensor | None
    low_rank_scale: torch.Tensor | None
    type_bias: torch.Tensor | None


def w4_product(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Exact integer product of `codes` `(n, d)` in split order with packed weights `(m, d / 2)`: `int64`, `(n, m)`."""
    weight = unpack(packed.unsqueeze(1), 4, 2 * packed.shape[1], torch.int8).flatten(1)
    return (join_columns(codes).double() @ weight.double().mT).long()


def w4_linear(
    rows: Rows, types: torch.Tensor | None, weight: Weight, out_dtype: torch.dtype, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Output `(n, m)` of a quantized linear for rounded rows; arithmetic after the integer product in `dtype`."""
    scale, offset, _ = rows.stats.to(dtype).unsqueeze(-1)
    y = w4_product(rows.codes, weight.packed).to(dtype) * scale + offset * weight.row_sum.to(dtype)
    y = y * weight.qscale.to(dtype)
    if weight.low_rank is not None:
        rank = weight.low_rank.shape[1]
        y = y + (rows.branch[:, :rank].to(dtype) * weight.low_rank_scale.to(dtype)) @ weight.low_rank.to(dtype).mT
    if weight.type_bias is not None:
        y = y + pick(weight.type_bias.to(dtype), types)
    return y.to(out_dtype)
