"""Triton: one row through a whole quantized linear in one launch: every program rounds the row for itself.

With one row the three launches that round it are a chain of waits, longer than memory takes to bring a large weight. Here each
program asks for its first weights, rounds the row while they come, and multiplies: nothing waits for another program. What
is done once per program is small as long as the row is (up to 4096 numbers): the basis of the branch is read as bytes.

The specification is `reference.round_rows` followed by `reference.w4_linear`. Arithmetic is that of `rounding_triton`, but for
the branch, which is taken off in float32: a byte in the last bits of a number near one is that number, and the sum of a
row with the ones is taken off again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.dp4a_triton import _dp4a
from optimum_freeact.kernels.epilogue_triton import scale_outputs, scales_of
from optimum_freeact.kernels.grids_triton import _grid, _stepped
from optimum_freeact.kernels.launches import launch_pdl, row_launch
from optimum_freeact.kernels.reference import HEADROOM, Rows, Weight
from optimum_freeact.kernels.tables import InputTables
from optimum_freeact.kernels.triton_state import INTERPRETED


LINES = tl.constexpr(8)  # of the basis at a time
STEP = tl.constexpr(2.0**-15)  # of a byte in the bits 8 to 15 of a number


@triton.jit
def _near_one(words, PLAIN: tl.constexpr):
    """1 + byte * 2^-15 for the four bytes of words."""
    if PLAIN:
        first = (words & 255).to(tl.float32) * STEP + 1.0
        second = ((words >> 8) & 255).to(tl.float32) * STEP + 1.0
        third = ((words >> 16) & 255).to(tl.float32) * STEP + 1.0
        fourth = ((words >> 24) & 255).to(tl.float32) * STEP + 1.0
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            """{ .reg .b32 k; mov.b32 k, 0x3F800000;
            prmt.b32 $0, $4, k, 0x7604;
            prmt.b32 $1, $4, k, 0x7614;
            prmt.b32 $2, $4, k, 0x7624;
            prmt.b32 $3, $4, k, 0x7634; }""",
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return first, second, third, fourth


@triton.jit
def _fetch(
    t, w_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, m,
    WORDS: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """All that the outputs of tile `t` are made of."""
    outs = t * BN + tl.arange(0, BN)
    is_out = outs < m
    k = tl.arange(0, WORDS)
    at = outs.to(tl.int64)[:, None] * WORDS + k[None, :]
    w = tl.load(w_ptr + at, mask=is_out[:, None], other=0, eviction_policy="evict_first")
    qscale = tl.load(qscale_ptr + outs, mask=is_out, other=0.0)
    row_sum = tl.load(row_sum_ptr + outs, mask=is_out, other=0)
    c = tl.arange(0, PR)
    branch = tl.zeros((BN, PR), tl.int8)
    scale = tl.zeros((PR,), tl.float32)
    if RANK > 0:
        branch = tl.load(
            low_rank_ptr + outs[:, None] * RANK + c[None, :], mask=is_out[:, None] & (c < RANK)[None, :], other=0
        )
        scales = scales_of(low_rank_scale_ptr, t * BN, RANK, UNIT)
        scale = tl.load(scales + c, mask=(c < RANK) & (t * BN + 0 * c < m), other=0.0)
    bias = tl.zeros((BN,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outs, mask=is_out, other=0.0)
    return w, qscale, row_sum, branch, scale, bias


@triton.jit
def _emit(
    t, w, qscale, row_sum, branch, branch_scale, bias, even, odd, scale, offset, total, p, y_ptr, m,
    WORDS: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """The outputs of tile `t`."""
    outs = t * BN + tl.arange(0, BN)
    acc = tl.zeros((BN, WORDS), tl.int32)
    acc = _dp4a(w & 0x0F0F0F0F, tl.broadcast_to(even[None, :], (BN, WORDS)), acc, PLAIN)
    acc = _dp4a((w >> 4) & 0x0F0F0F0F, tl.broadcast_to(odd[None, :], (BN, WORDS)), acc, PLAIN)
    y = (tl.sum(acc, 1) - 8 * total).to(tl.float32) * scale + offset * row_sum.to(tl.float32)
    y = y * qscale + bias
    if RANK > 0:
        y += tl.sum(branch.to(tl.float32) * (p * branch_scale)[None, :], 1)
    tl.store(y_ptr + outs, y.to(y_ptr.dtype.element_ty), mask=outs < m)


@triton.jit
def _joined(a, b, c, d, A: tl.constexpr, B: tl.constexpr):
    """Numbers 4 k, 4 k + 1, 4 k + 2 and 4 k + 3 of a row as its tile."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))  # [k, second bit, first bit]
    return tl.reshape(pairs, (A, B))


@triton.jit
def _rounded(
    x_ptr, mean_ptr, basis_ptr, basis_scale_ptr, left, right, clip, factor, kind,
    HAS_MEAN: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, LIMIT: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Words of even and of odd codes, scale, offset and sum of the codes, and the branch's coordinates."""
    Q: tl.constexpr = A * B // 4
    k = tl.arange(0, Q)
    u0 = tl.load(x_ptr + 4 * k).to(tl.float32)
    u1 = tl.load(x_ptr + 4 * k + 1).to(tl.float32)
    u2 = tl.load(x_ptr + 4 * k + 2).to(tl.float32)
    u3 = tl.load(x_ptr + 4 * k + 3).to(tl.float32)
    if HAS_MEAN:
        row = mean_ptr + kind * (A * B) + 4 * k
        u0 -= tl.load(row).to(tl.float32)
        u1 -= tl.load(row + 1).to(tl.float32)
        u2 -= tl.load(row + 2).to(tl.float32)
        u3 -= tl.load(row + 3).to(tl.float32)
    peak = tl.maximum(tl.maximum(tl.abs(u0), tl.abs(u1)), tl.maximum(tl.abs(u2), tl.abs(u3)))
    undo = tl.maximum(tl.max(peak, 0), 1e-30) / LIMIT
    p = tl.zeros((PR,), tl.float32)
    if RANK > 0:
        r = tl.arange(0, PR)
        some = tl.arange(0, LINES)
        ones = tl.sum(u0 + u1 + u2 + u3, 0)
        for first in tl.range(0, PR, LINES, num_stages=1, loop_unroll_factor=1):
            words = tl.load(basis_ptr + (first + some)[:, None] * Q + k[None, :])
            v0, v1, v2, v3 = _near_one(words, PLAIN)
            found = tl.sum(v0 * u0[None, :] + v1 * u1[None, :] + v2 * u2[None, :] + v3 * u3[None, :], 1)
            p += tl.sum(tl.where(r[:, None] == (first + some)[None, :], found[None, :], 0.0), 1)
        scale = tl.load(basis_scale_ptr + r, mask=r < RANK, other=0.0)
        p = ((p - ones) / STEP - 128.0 * ones) * scale
        weights = p * scale
        ones = tl.sum(weights, 0)
        taken = ones / STEP + 128.0 * ones
        u0, u1, u2, u3 = u0 + taken, u1 + taken, u2 + taken, u3 + taken
        for first in tl.range(0, PR, LINES, num_stages=1, loop_unroll_factor=1):
            words = tl.load(basis_ptr + (first + some)[:, None] * Q + k[None, :])
            v0, v1, v2, v3 = _near_one(words, PLAIN)
            weight = tl.sum(tl.where((first + some)[:, None] == r[None, :], weights[None, :], 0.0), 1)[:, None] / STEP
            u0 -= tl.sum(weight * v0, 0)
            u1 -= tl.sum(weight * v1, 0)
            u2 -= tl.sum(weight * v2, 0)
            u3 -= tl.sum(weight * v3, 0)
    shrink = 1.0 / undo
    tile = _joined(u0 * shrink, u1 * shrink, u2 * shrink, u3 * shrink, A, B).to(tl.float16)
    z = tl.dot(left, tl.dot(tile, right).to(tl.float16))
    undo *= factor
    low, high = tl.min(tl.min(z, 1), 0), tl.max(tl.max(z, 1), 0)
    nan = tl.where(tl.abs(high - low) < float("inf"), 0.0, float("nan"))
    scale, offset = _grid(low, high, clip, 1.0 / undo, QMIN, QMAX, SYMMETRIC)
    inverse = 1.0 / scale
    codes = _stepped(z, inverse, offset * inverse, QMIN, QMAX).to(tl.int32, bitcast=True) - 0x4B400000
    total = tl.sum(tl.sum(codes, 1), 0)
    bytes_ = tl.reshape(codes & 255, (A, B // 4, 4)) << (8 * tl.arange(0, 4))[None, None, :]
    words = tl.permute(tl.reshape(tl.sum(bytes_, 2), (A, 2, B // 8)), (0, 2, 1))
    even, odd = tl.split(words)
    even, odd = tl.reshape(even, (A * B // 8,)), tl.reshape(odd, (A * B // 8,))
    return even, odd, scale * undo + nan, offset * undo + nan, total, p


@triton.jit
def _row_linear(
    x_ptr, types_ptr, mean_ptr, basis_ptr, basis_scale_ptr, left_ptr, right_ptr, clip_ptr, factor_ptr, w_ptr, qscale_ptr,
    row_sum_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, y_ptr, m, n_means, n_clips, n_bias,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr,
    LIMIT: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = A * B // 8
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kind = 0
    if HAS_TYPES:  # there since the model's own hook ran, long before
        kind = tl.load(types_ptr)
        if HAS_BIAS:
            bias_ptr += tl.minimum(kind, n_bias - 1) * m
    step = tl.num_programs(0)
    t = tl.program_id(0)
    w0, q0, s0, l0, c0, b0 = _fetch(
        t,
        w_ptr,
        qscale_ptr,
        row_sum_ptr,
        low_rank_ptr,
        low_rank_scale_ptr,
        bias_ptr,
        m,
        WORDS,
        HAS_BIAS,
        RANK,
        PR,
        BN,
        UNIT,
    )
    w1, q1, s1, l1, c1, b1 = _fetch(
        t + step,
        w_ptr,
        qscale_ptr,
        row_sum_ptr,
        low_rank_ptr,
        low_rank_scale_ptr,
        bias_ptr,
        m,
        WORDS,
        HAS_BIAS,
        RANK,
        PR,
        BN,
        UNIT,
    )
    i, j = tl.arange(0, A), tl.arange(0, B)
    left = tl.load(left_ptr + i[:, None] * A + i[None, :])
    right = tl.load(right_ptr + j[:, None] * B + j[None, :])
    clip = tl.load(clip_ptr + (tl.minimum(kind, n_clips - 1) if HAS_TYPES else 0))
    factor = tl.load(factor_ptr)
    if PDL:
        tl.extra.cuda.gdc_wait()
    even, odd, scale, offset, total, p = _rounded(
        x_ptr, mean_ptr, basis_ptr, basis_scale_ptr, left, right, clip, factor,
        tl.minimum(kind, n_means - 1) if HAS_TYPES else 0, HAS_MEAN, RANK, PR, A, B, QMIN, QMAX, SYMMETRIC, LIMIT, PLAIN,
    )  # fmt: skip
    for t in range(tl.program_id(0), tl.cdiv(m, BN), 2 * step):
        _emit(t, w0, q0, s0, l0, c0, b0, even, odd, scale, offset, total, p, y_ptr, m, WORDS, RANK, BN, PLAIN)
        w0, q0, s0, l0, c0, b0 = _fetch(
            t + 2 * step,
            w_ptr,
            qscale_ptr,
            row_sum_ptr,
            low_rank_ptr,
            low_rank_scale_ptr,
            bias_ptr,
            m,
            WORDS,
            HAS_BIAS,
            RANK,
            PR,
            BN,
            UNIT,
        )
        _emit(t + step, w1, q1, s1, l1, c1, b1, even, odd, scale, offset, total, p, y_ptr, m, WORDS, RANK, BN, PLAIN)
        w1, q1, s1, l1, c1, b1 = _fetch(
            t + 3 * step,
            w_ptr,
            qscale_ptr,
            row_sum_ptr,
            low_rank_ptr,
            low_rank_scale_ptr,
            bias_ptr,
            m,
            WORDS,
            HAS_BIAS,
            RANK,
            PR,
            BN,
            UNIT,
        )


@triton.jit
def _round_row(
    x_ptr, types_ptr, mean_ptr, basis_ptr, basis_scale_ptr, left_ptr, right_ptr, clip_ptr, factor_ptr, codes_ptr, stats_ptr,
    branch_ptr, n, n_means, n_clips,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, LIMIT: tl.constexpr,
    PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row's codes as `rounding_triton` leaves them."""
    WORDS: tl.constexpr = A * B // 8
    row = tl.program_id(0)
    kind = 0
    if HAS_TYPES:  # there since the model's own hook ran, long before
        kind = tl.load(types_ptr + row)
    i, j = tl.arange(0, A), tl.arange(0, B)
    left = tl.load(left_ptr + i[:, None] * A + i[None, :])
    right = tl.load(right_ptr + j[:, None] * B + j[None, :])
    clip = tl.load(clip_ptr + (tl.minimum(kind, n_clips - 1) if HAS_TYPES else 0))
    factor = tl.load(factor_ptr)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    even, odd, scale, offset, total, p = _rounded(
        x_ptr + row.to(tl.int64) * (A * B), mean_ptr, basis_ptr, basis_scale_ptr, left, right, clip, factor,
        tl.minimum(kind, n_means - 1) if HAS_TYPES else 0, HAS_MEAN, RANK, PR, A, B, QMIN, QMAX, SYMMETRIC, LIMIT, PLAIN,
    )  # fmt: skip
    k = tl.arange(0, WORDS)
    tl.store(codes_ptr + row * 2 * WORDS + k, even)
    tl.store(codes_ptr + row * 2 * WORDS + WORDS + k, odd)
    tl.store(stats_ptr + row, scale)
    tl.store(stats_ptr + n + row, offset)
    tl.store(stats_ptr + 2 * n + row, total.to(tl.float32))
    if RANK > 0:
        tl.store(branch_ptr + row * PR + tl.arange(0, PR), p)


def round_rows(
    x: torch.Tensor, types: torch.Tensor | None, tables: InputTables, *, options: dict | None = None
) -> Rows:
    """As `rounding_triton.round_rows`, a program for each row."""
    n, d = x.shape
    rows = Rows(
        torch.empty(n, d, dtype=torch.int8, device=x.device),
        torch.empty(3, n, dtype=torch.float32, device=x.device),
        torch.empty(n, tables.branch, dtype=torch.float32, device=x.device) if tables.rank else None,
    )
    if len(tables.clip) == 1 and (tables.mean is None or len(tables.mean) == 1):
        types = None
    qmax = (1 << (tables.bits - 1)) - 1
    launch = {**row_launch(tables.width), **(options or {})}
    pdl = launch_pdl(launch["pdl"])
    basis = None if tables.basis_bytes is None else tables.basis_bytes.view(torch.int32)
    _round_row[(n,)](
        x, types, tables.mean, basis, tables.basis_scale, tables.left, tables.right, tables.clip, tables.factor,
        rows.codes.view(torch.int32), rows.stats, rows.branch, n, 1 if tables.mean is None else len(tables.mean),
        len(tables.clip), HAS_TYPES=types is not None, HAS_MEAN=tables.mean is not None, RANK=tables.rank, PR=tables.branch,
        A=tables.a, B=tables.b, QMIN=-qmax - 1, QMAX=qmax, SYMMETRIC=tables.symmetric, LIMIT=HEADROOM, PLAIN=INTERPRETED,
        PDL=bool(pdl), num_warps=launch["warps"], **pdl,
    )  # fmt: skip
    return rows


def row_linear(
    x: torch.Tensor, types: torch.Tensor | None, tables: InputTables, weight: Weight, *, options: dict | None = None
) -> torch.Tensor:
    """Output `(1, m)` of one row `x` of shape `(1, d)`; see [`serves`]."""
    m = len(weight.packed)
    y = torch.empty(1, m, dtype=x.dtype, device=x.device)
    bias, low_rank = weight.type_bias, weight.low_rank
    if len(tables.clip) == 1 and (tables.mean is None or len(tables.mean) == 1) and (bias is None or len(bias) == 1):
        types = None
    qmax = (1 << (tables.bits - 1)) - 1
    launch = {**row_launch(tables.width), **(options or {})}
    pdl = launch_pdl(launch["pdl"])
    basis = None if tables.basis_bytes is None else tables.basis_bytes.view(torch.int32)
    _row_linear[(min(launch["programs"], triton.cdiv(m, launch["BN"])),)](
        x, types, tables.mean, basis, tables.basis_scale, tables.left, tables.right, tables.clip, tables.factor,
        weight.packed.view(torch.int32), weight.qscale, weight.row_sum, low_rank, weight.low_rank_scale, bias, y, m,
        1 if tables.mean is None else len(tables.mean), len(tables.clip), 1 if bias is None else len(bias),
        HAS_TYPES=types is not None, HAS_MEAN=tables.mean is not None, HAS_BIAS=bias is not None, RANK=tables.rank,
        PR=tables.branch, A=tables.a, B=tables.b, QMIN=-qmax - 1, QMAX=qmax, SYMMETRIC=tables.symmetric, LIMIT=HEADROOM,
        BN=launch["BN"], UNIT=scale_outputs(weight), PLAIN=INTERPRETED, PDL=bool(pdl), num_warps=launch["warps"], **pdl,
    )  # fmt: skip
    return y
