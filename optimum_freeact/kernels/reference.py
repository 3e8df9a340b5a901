"""What the kernels compute, in plain torch: the specification that each is tested against.

Between the kernels codes have an order of their own: in each row the even columns first, then the odd ones. A byte of a
packed weight holds an even column in its low nibble and the odd one after it in its high nibble, so that the two halves
of a row of codes meet the two nibbles of a row of bytes without any shuffle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from optimum_freeact.numerics.affine import choose_qparams, dequantize, quantize, round_codes
from optimum_freeact.numerics.packing import unpack
from optimum_freeact.transforms.affine_map import InputMap, pick


class Rows(NamedTuple):
    """Rounded rows as kernels hand them on.

    Where weights or activations have groups, `codes` are values on their grids in units of a scale of the row.

    Args:
        codes (`int8`, with groups `float16`, shape `(n, d)`): Even columns, then odd ones.
        stats (`float32`, shape `(3, n)`): Scale, offset and sum of the codes of each row; with groups scales only, `(1, n)`.
        branch (`float32`, shape `(n, padded r)`, *optional*): High-precision coordinates, zeros where padded. For Triton's
            products the marks of token types stand after them ([`marked`]).
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
    group: int = 0,
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
        group (`int`, *optional*, defaults to 0): Columns that share a grid, for values instead of codes.
    """
    z, p = found.to(dtype).apply(x.to(dtype), types)
    if p is not None:
        p = torch.nn.functional.pad(p, (0, branch - p.shape[-1]))
    if group:
        return _round_groups(z, pick(clip.to(dtype).unsqueeze(-1), types), bits, symmetric, group, p)
    qparams = choose_qparams(z, bits, symmetric, pick(clip.to(dtype).unsqueeze(-1), types))
    codes = quantize(z, qparams, bits)
    total = codes.sum(-1).nan_to_num(0.0)
    offset = torch.zeros_like(qparams.scale) if qparams.offset is None else qparams.offset
    stats = torch.stack((qparams.scale.squeeze(-1), offset.squeeze(-1), total)).to(dtype)
    return Rows(split_columns(codes.nan_to_num(0.0).to(torch.int8)), stats, p)


MOST_MARKED = 9  # types; with more the marks would outgrow the coordinates that they stand beside


def n_marks(n_means: int) -> int:
    """Columns of a branch that say a row's type, where there is a branch."""
    return 2 * (n_means - 1) if 1 < n_means <= MOST_MARKED else 0


def marked(rows: Rows, types: torch.Tensor | None, rank: int, n_means: int) -> Rows:
    """Rows whose branch also says each row's type, for products whose weight has [`type_columns`].

    After the `rank` coordinates come two columns for each type beyond the first: a row of type k > 0 has ones in the k-th two
    of them, one of type 0 has zeros. Rows without a branch have no marks: products choose by the types themselves then.
    """
    if n_marks(n_means) == 0 or rows.branch is None:
        return rows
    further = n_means - 1
    branch = rows.branch.clone()
    if types is not None:
        kind = types.clamp(max=further)[:, None]
        marks = (kind == torch.arange(1, n_means, device=kind.device)).to(branch.dtype)
        branch[:, rank : rank + 2 * further] = marks.repeat_interleave(2, 1)
    return rows._replace(branch=branch)


HEADROOM = 128.0  # largest |u| of a row in float16: a rotation may gather a whole row of 2^17 entries in one


def _round_groups(
    z: torch.Tensor, clip: torch.Tensor, bits: int, symmetric: bool, group: int, p: torch.Tensor | None
) -> Rows:
    """Values on the grids of groups, float16 (float64 in float64) in units of a scale that fits the row."""
    groups, clip = z.unflatten(-1, (-1, group)), clip.unsqueeze(-2) if clip.dim() > 1 else clip
    qparams = choose_qparams(groups, bits, symmetric, clip)
    values = dequantize(round_codes(groups, qparams, bits), qparams).flatten(-2)
    peak = values.abs().amax(-1) / HEADROOM
    scale = torch.where((peak > 0) & peak.isfinite(), peak, torch.ones_like(peak))
    kept = torch.float64 if z.dtype == torch.float64 else torch.float16
    return Rows(split_columns((values / scale[:, None]).to(kept)), scale[None], p)


SCALE_OUTPUTS = 256  # outputs that share the branch's scales where several linears are one


class Weight(NamedTuple):
    """What a quantized linear stores, as the kernels read it.

    Args:
        packed (`uint8`, shape `(m, d / 2)`): Nibbles of code + 8.
        qscale (`float32`, shape `(m,)`): Scale of each output channel.
        row_sum (`int32`, shape `(m,)`): Sum of each row's codes.
        low_rank (`int8`, shape `(m, r)`, *optional*) and low_rank_scale (`float32`, shape `(r,)`, *optional*): The branch; the
            scales of shape `(m / SCALE_OUTPUTS, r)` where several linears are one.
        type_bias (`float32`, shape `(n_means or 1, m)`, *optional*): Output bias of each token type.
        group_scale (`int8`, shape `(m, groups)`, *optional*): By which a group's codes are multiplied before `qscale`.
        type_columns (`int8`, shape `(m + 1, 2 (n_means - 1))`, without a branch `bfloat16`, shape `(m, 16)`, *optional*): See
            [`type_columns`]; for Triton, which makes them of the biases where they are missing.
    """

    packed: torch.Tensor
    qscale: torch.Tensor
    row_sum: torch.Tensor
    low_rank: torch.Tensor | None
    low_rank_scale: torch.Tensor | None
    type_bias: torch.Tensor | None
    group_scale: torch.Tensor | None = None
    type_columns: torch.Tensor | None = None


def in_fours(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros behind the last dimension up to a multiple of four: so many bytes of a branch are read at once."""
    missing = -tensor.shape[-1] % 4
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def type_columns(bias: torch.Tensor | None, beside_branch: bool) -> torch.Tensor | None:
    """How much the biases `(n_means, m)` of further types exceed the first's, as columns that meet the marks of a row ([`marked`]).

    Two for each type. Beside a branch `int8`, `(m + 1, 2 (n_means - 1))`: the number in units of a power of two, and what that
    lost of it in units smaller by 256; the last line holds the exponents. Without one `bfloat16`, `(m, 16)`, as tensor cores
    take them: the number, what that lost of it, and zeros.
    """
    if bias is None or n_marks(len(bias)) == 0:
        return None
    change = (bias[1:] - bias[0]).mT
    if not beside_branch:
        upper = change.bfloat16()
        pairs = torch.stack((upper, (change - upper.float()).bfloat16()), -1).flatten(1)
        return torch.nn.functional.pad(pairs, (0, 2 * (MOST_MARKED - 1) - pairs.shape[1])).contiguous()
    exponent = torch.frexp(change.abs().amax(0) / 127).exponent.clamp(-100, 100)
    steps = torch.ldexp(change, -exponent)
    coarse = steps.round().clamp(-127, 127)
    fine = ((steps - coarse) * 256).round().clamp(-127, 127)
    digits = torch.stack((coarse, fine), -1).flatten(1)
    exponents = torch.stack((exponent, exponent - 8), -1).flatten()[None]
    return torch.cat((digits, exponents.to(digits.dtype))).to(torch.int8)


def w4_product(codes: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Exact integer product of `codes` `(n, d)` in split order with packed weights `(m, d / 2)`: `int64`, `(n, m)`."""
    weight = unpack(packed.unsqueeze(1), 4, 2 * packed.shape[1], torch.int8).flatten(1)
    return (join_columns(codes).double() @ weight.double().mT).long()


def steps(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Codes `(m, d)` times their groups' bytes: whole numbers up to 1016, which float16 holds exactly."""
    codes = unpack(weight.packed.unsqueeze(1), 4, 2 * weight.packed.shape[1], torch.int8).flatten(1).to(dtype)
    if weight.group_scale is None:
        return codes
    groups = weight.group_scale.shape[1]
    return (codes.unflatten(-1, (groups, -1)) * weight.group_scale.to(dtype).unsqueeze(-1)).flatten(1)


def w4_linear(
    rows: Rows, types: torch.Tensor | None, weight: Weight, out_dtype: torch.dtype, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Output `(n, m)` of a quantized linear for rounded rows; arithmetic after the integer product in `dtype`."""
    if rows.codes.is_floating_point():
        y = join_columns(rows.codes).to(dtype) @ steps(weight, dtype).mT * rows.stats[0].to(dtype)[:, None]
    else:
        scale, offset, _ = rows.stats.to(dtype).unsqueeze(-1)
        y = w4_product(rows.codes, weight.packed).to(dtype) * scale + offset * weight.row_sum.to(dtype)
    y = y * weight.qscale.to(dtype)
    if weight.low_rank is not None:
        assert rows.branch is not None
        assert weight.low_rank_scale is not None
        rank = weight.low_rank.shape[1]
        scale = weight.low_rank_scale.to(dtype)
        if scale.dim() > 1:
            scale = scale.repeat_interleave(SCALE_OUTPUTS, 0)
        y = y + rows.branch[:, :rank].to(dtype) @ (weight.low_rank.to(dtype) * scale).mT
    if weight.type_bias is not None:
        y = y + pick(weight.type_bias.to(dtype), types)
    return y.to(out_dtype)
