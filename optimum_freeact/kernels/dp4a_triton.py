"""Triton: one to four rows of codes times a packed 4-bit weight, on the plain cores (`reference.w4_linear`).

Four codes and four nibbles meet in one instruction (`dp4a`), so that a word of eight weights costs five instructions and
the kernel is as fast as memory brings the weight. The bytes are read as 32-bit words; the codes, in split order, are
words of four even or four odd columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.epilogue_triton import (
    MOST_KINDS,
    bias_of_one,
    biases_of,
    chosen_bias,
    scale_outputs,
    scales_of,
)
from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import dp4a_launch, launch_pdl
from optimum_freeact.kernels.reference import Rows, Weight
from optimum_freeact.kernels.triton_state import INTERPRETED


@triton.jit
def _dp4a(w, x, acc, PLAIN: tl.constexpr):
    """Sum of four products and `acc`; bytes of `w` are 0 to 15, of `x` signed."""
    if PLAIN:
        for s in tl.static_range(4):
            acc += ((w >> (8 * s)) & 0xF) * ((x << (24 - 8 * s)) >> 24)
        return acc
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _dp4a_linear(
    codes_ptr, stats_ptr, branch_ptr, types_ptr, w_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr,
    bias_ptr, y_ptr, m, n_bias,
    N: tl.constexpr, WORDS: tl.constexpr, HAS_BIAS: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    PR: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, UNIT: tl.constexpr,
    PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    given = 0
    if N == 1 and KINDS > 0:  # first of all: where the biases lie hangs on it
        given = tl.load(types_ptr)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    is_out = outs < m
    k = tl.arange(0, BW)
    at = tl.where(is_out, outs, 0).to(tl.int64)[:, None] * WORDS + k[None, :]
    w = tl.load(w_ptr + at, mask=(k < WORDS)[None, :], other=0, eviction_policy="evict_first")
    low = w & 0x0F0F0F0F
    high = (w >> 4) & 0x0F0F0F0F
    qscale = tl.load(qscale_ptr + outs, mask=is_out, other=0.0)
    row_sum = tl.load(row_sum_ptr + outs, mask=is_out, other=0).to(tl.float32)
    c = tl.arange(0, PR)
    if RANK > 0:
        low_rank = tl.load(
            low_rank_ptr + outs[:, None] * RANK + c[None, :], mask=is_out[:, None] & (c < RANK)[None, :], other=0
        ).to(tl.float32)
        scales = scales_of(low_rank_scale_ptr, tl.program_id(0) * BN, RANK, UNIT)
        low_rank_scale = tl.load(scales + c, mask=c < RANK, other=0.0)
    if N == 1:
        bias = bias_of_one(bias_ptr, given, outs, m, n_bias, HAS_BIAS)
    else:
        FEW_KINDS: tl.constexpr = KINDS if KINDS <= MOST_KINDS else 0
        first, one, two, three, kind = biases_of(bias_ptr, types_ptr, tl.arange(0, 1), outs, N, m, HAS_BIAS, FEW_KINDS)
    if PDL:  # the weights are on their way while the codes are still being made
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for t in tl.static_range(N):
        even = tl.load(codes_ptr + t * 2 * WORDS + k, mask=k < WORDS, other=0)
        odd = tl.load(codes_ptr + t * 2 * WORDS + WORDS + k, mask=k < WORDS, other=0)
        acc = tl.zeros((BN, BW), tl.int32)
        acc = _dp4a(low, tl.broadcast_to(even[None, :], (BN, BW)), acc, PLAIN)
        acc = _dp4a(high, tl.broadcast_to(odd[None, :], (BN, BW)), acc, PLAIN)
        total = tl.load(stats_ptr + 2 * N + t).to(tl.int32)
        product = (tl.sum(acc, 1) - 8 * total).to(tl.float32)
        taken = tl.load(stats_ptr + N + t) * row_sum
        y = tl.fma(product, tl.load(stats_ptr + t), taken) * qscale  # told apart, as in `epilogue_triton.scaled`
        if RANK > 0:
            p = tl.load(branch_ptr + t * PR + c) * low_rank_scale
            y += tl.sum(low_rank * p[None, :], 1)
        if N == 1:
            y += bias
        elif KINDS > MOST_KINDS:
            kind = tl.minimum(tl.load(types_ptr + t), n_bias - 1)
            y += tl.load(bias_ptr + kind * m + outs, mask=is_out, other=0.0)
        elif HAS_BIAS:
            if KINDS > 0:
                kind = tl.load(types_ptr + t + tl.arange(0, 1))
            y += chosen_bias(first, one, two, three, kind, KINDS)
        tl.store(y_ptr + t * m + outs, y.to(y_ptr.dtype.element_ty), mask=is_out)


def w4_linear(
    rows: Rows,
    types: torch.Tensor | None,
    weight: Weight,
    out_dtype: torch.dtype,
    *,
    options: dict | None = None,
) -> torch.Tensor:
    """Output `(n, m)` of one to four rounded rows; the row length is divisible by 8."""
    n, d = rows.codes.shape
    m = len(weight.packed)
    y = torch.empty(n, m, dtype=out_dtype, device=rows.codes.device)
    bias, low_rank = weight.type_bias, weight.low_rank
    rank = 0 if low_rank is None else low_rank.shape[1]
    n_bias = 0 if bias is None else len(bias)
    if n_bias == 1:
        types = None
    words = d // 8
    wide = 1 << (words - 1).bit_length()
    launch = {**dp4a_launch(n, wide), **(options or {})}
    pdl = launch_pdl(launch["pdl"])
    start(
        _dp4a_linear, (-(-m // launch["BN"]),),
        (rows.codes.view(torch.int32), rows.stats, rows.branch, types, weight.packed.view(torch.int32), weight.qscale,
        weight.row_sum, low_rank, weight.low_rank_scale, bias, y, m, n_bias), N=n, WORDS=words,
        KINDS=0 if types is None else n_bias - 1, HAS_BIAS=bias is not None, RANK=rank,
        PR=16 if rows.branch is None else rows.branch.shape[1], BN=launch["BN"], BW=wide, UNIT=scale_outputs(weight),
        PLAIN=INTERPRETED, PDL=bool(pdl),

        num_warps=launch["warps"], **pdl,
    )  # fmt: skip
    return y
