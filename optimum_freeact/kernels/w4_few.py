"""Gluon: a few rows of codes times a packed 4-bit weight (`reference.w4_linear`), from memory straight into tensor cores' registers.

A program has some outputs; its warps share out the row, so that their sums meet in shared memory at the end. Each thread brings
its bytes of the weight in the order in which the matrix instruction wants them, many at once, before it waits for the
codes: nothing of the weight goes through shared memory, and no step of a loop waits for another. Which columns meet in
one instruction does not matter as long as weight and codes agree, so a thread's sixteen bytes lie side by side in both.

Sums are whole numbers, so neither their order nor the other rows change a row's result.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from optimum_freeact.kernels.epilogue_triton import scale_outputs
from optimum_freeact.kernels.launches import few_launch, launch_pdl
from optimum_freeact.kernels.nibbles_gluon import high_codes, low_codes
from optimum_freeact.kernels.reference import Rows, Weight


@gluon.jit
def _three(size_0: gl.constexpr, size_1: gl.constexpr, size_2: gl.constexpr, layout: gl.constexpr):
    """Indices along the three dimensions of a layout, each to be broadcast."""
    zero = gl.arange(0, size_0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    one = gl.arange(0, size_1, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    two = gl.arange(0, size_2, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return (
        gl.expand_dims(gl.expand_dims(zero, 1), 2),
        gl.expand_dims(gl.expand_dims(one, 0), 2),
        gl.expand_dims(gl.expand_dims(two, 0), 1),
    )


@gluon.jit
def _load(ptrs, k, END: gl.constexpr, WHOLE: gl.constexpr, CACHE: gl.constexpr):
    if WHOLE:
        return gl.load(ptrs, cache_modifier=CACHE)
    else:  # beyond the row: zeros on both sides
        return gl.load(ptrs, mask=k < END, other=0, cache_modifier=CACHE)


@gluon.jit
def _branch(
    branch_ptr, low_rank_ptr, scale_ptr, first, n, m,
    RANK: gl.constexpr, PR: gl.constexpr, UNIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr,
    mma: gl.constexpr,
):  # fmt: skip
    """The low-rank branch (outs, tokens): a product of bfloat16 pairs, upper parts for the first warps, lower ones for the rest."""
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    WIDE: gl.constexpr = 16 if 2 * PR // WARPS < 16 else 2 * PR // WARPS
    if UNIT > 0:
        scale_ptr += (first // UNIT) * RANK
    part, out, c = _three(WARPS, BN, WIDE, left)
    k = part * WIDE + c
    at = gl.minimum(first + out, m - 1) * RANK + k % PR
    low_rank = gl.load(low_rank_ptr + at, mask=(k % PR < RANK) & (k < 2 * PR) & (out >= 0), other=0)
    part, c, token = _three(WARPS, WIDE, BM, right)
    k = part * WIDE + c
    r = k % PR
    inside = (r < RANK) & (k < 2 * PR) & (token < n)
    value = gl.load(branch_ptr + token * PR + r, mask=inside, other=0.0)
    value *= gl.load(scale_ptr + r, mask=r < RANK, other=0.0)
    upper = value.to(gl.bfloat16)
    lower = (value - upper.to(gl.float32)).to(gl.bfloat16)
    pair = gl.where(k < PR, upper, lower)
    return gl.sum(mma_v2(low_rank.to(gl.bfloat16), pair, gl.zeros((WARPS, BN, BM), gl.float32, mma)), 0)


@gluon.jit
def _w4_few(
    codes_ptr, stats_ptr, branch_ptr, types_ptr, w_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr,
    y_ptr, n, m,
    HALF: gl.constexpr, HAS_BIAS: gl.constexpr, KINDS: gl.constexpr, RANK: gl.constexpr, PR: gl.constexpr,
    UNIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, CHUNK: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 16)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 16)
    STRIDE: gl.constexpr = CHUNK * WARPS
    STEPS: gl.constexpr = (HALF + STRIDE - 1) // STRIDE
    WHOLE: gl.constexpr = HALF % STRIDE == 0
    first = gl.program_id(0) * BN
    part, out, byte = _three(WARPS, BN, CHUNK, left)
    k = part * CHUNK + byte
    w_ptrs = w_ptr + gl.minimum(first + out, m - 1).to(gl.int64) * HALF + k
    w = _load(w_ptrs, k, HALF, WHOLE, ".cg")
    part, byte, token = _three(WARPS, CHUNK, BM, right)
    codes_k = part * CHUNK + byte
    codes_ptrs = codes_ptr + gl.minimum(token, n - 1) * (2 * HALF) + codes_k
    end: gl.constexpr = gl.SliceLayout(0, mma)
    outs = first + gl.arange(0, BN, gl.SliceLayout(1, end))
    is_out = outs < m
    tokens = gl.arange(0, BM, gl.SliceLayout(0, end))
    is_token = tokens < n
    row_sum = gl.load(row_sum_ptr + outs, mask=is_out, other=0)
    qscale = gl.load(qscale_ptr + outs, mask=is_out, other=0.0)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + outs, mask=is_out, other=0.0)
    if KINDS > 0:  # there since the model's own hook ran, long before
        kind = gl.load(types_ptr + tokens, mask=is_token, other=0).to(gl.int32)
        one = gl.load(bias_ptr + m + outs, mask=is_out, other=0.0)
    if KINDS > 1:
        two = gl.load(bias_ptr + 2 * m + outs, mask=is_out, other=0.0)
    if KINDS > 2:
        three = gl.load(bias_ptr + 3 * m + outs, mask=is_out, other=0.0)
    if PDL:  # the weights are on their way while the codes are still being made
        gdc_launch_dependents()
        gdc_wait()
    acc = gl.zeros((WARPS, BN, BM), gl.int32, mma)
    for step in gl.static_range(STEPS):
        at = step * STRIDE
        if step + 1 < STEPS:
            coming = _load(w_ptrs + (at + STRIDE), k + (at + STRIDE), HALF, WHOLE, ".cg")
        even = _load(codes_ptrs + at, codes_k + at, HALF, WHOLE, "")
        odd = _load(codes_ptrs + (at + HALF), codes_k + at, HALF, WHOLE, "")
        acc = mma_v2(low_codes(w), even, acc)
        acc = mma_v2(high_codes(w), odd, acc)
        if step + 1 < STEPS:
            w = coming
    scale = gl.load(stats_ptr + tokens, mask=is_token, other=0.0) * 0.0625  # codes are sixteen times themselves
    offset = gl.load(stats_ptr + n + tokens, mask=is_token, other=0.0)
    y = gl.sum(acc, 0).to(gl.float32) * gl.expand_dims(scale, 0)
    y += gl.expand_dims(offset, 0) * gl.expand_dims(row_sum.to(gl.float32), 1)
    y *= gl.expand_dims(qscale, 1)
    if HAS_BIAS:
        found = gl.expand_dims(bias, 1)
        if KINDS > 0:
            found = gl.where(gl.expand_dims(kind >= 1, 0), gl.expand_dims(one, 1), found)
        if KINDS > 1:
            found = gl.where(gl.expand_dims(kind >= 2, 0), gl.expand_dims(two, 1), found)
        if KINDS > 2:
            found = gl.where(gl.expand_dims(kind >= 3, 0), gl.expand_dims(three, 1), found)
        y += found
    if RANK > 0:
        y += _branch(branch_ptr, low_rank_ptr, low_rank_scale_ptr, first, n, m, RANK, PR, UNIT, BM, BN, WARPS, mma)
    place = gl.expand_dims(tokens, 0).to(gl.int64) * m + gl.expand_dims(outs, 1)
    inside = gl.expand_dims(is_token, 0) & gl.expand_dims(is_out, 1)
    gl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


def w4_linear(
    rows: Rows,
    types: torch.Tensor | None,
    weight: Weight,
    out_dtype: torch.dtype,
    *,
    options: dict | None = None,
) -> torch.Tensor:
    """Output `(n, m)` of few rounded rows, see [`dispatch.few_choice`]; `options` overrides launch settings."""
    n = len(rows.codes)
    m, half = weight.packed.shape
    y = torch.empty(n, m, dtype=out_dtype, device=rows.codes.device)
    bias, low_rank = weight.type_bias, weight.low_rank
    n_bias = 0 if bias is None else len(bias)
    launch = few_launch(n, half, options or {})
    pdl = launch_pdl(launch["pdl"])
    _w4_few[(triton.cdiv(m, launch["BN"]),)](
        rows.codes, rows.stats, rows.branch, types, weight.packed, weight.qscale, weight.row_sum, low_rank,
        weight.low_rank_scale, bias, y, n, m, HALF=half, HAS_BIAS=bias is not None,
        KINDS=0 if types is None else max(0, n_bias - 1), RANK=0 if low_rank is None else low_rank.shape[1],
        PR=16 if rows.branch is None else rows.branch.shape[1], UNIT=scale_outputs(weight), BM=launch["BM"],
        BN=launch["BN"], CHUNK=launch["chunk"], WARPS=launch["warps"], PDL=bool(pdl), num_warps=launch["warps"], **pdl,
    )  # fmt: skip
    return y
