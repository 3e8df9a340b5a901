"""Triton: rows of codes times a packed 4-bit weight, with everything that follows in the same pass (`reference.w4_linear`).

The integer product is exact. Bytes of the weight are taken apart in registers into two operands of unsigned nibbles
(code + 8; the eight is taken back by the sum of the row's codes), one for the even and one for the odd columns. The
weight is the left operand, which tensor cores read from registers, so that nothing unpacked ever goes through memory.

What follows happens in the accumulator: scales, the biases of the types, and a product of the high-precision coordinates
(bfloat16 pairs) with the low-rank branch. Every row goes through the same steps whatever the others' types are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.epilogue_triton import (
    add_bias,
    add_branch,
    arrived_last,
    biases_of,
    branch_of_rows,
    branch_of_weight,
    further_types,
    marks_of,
    room_for_parts,
    scale_outputs,
    scaled,
    scales_of,
    store_outputs,
    tile_order,
)
from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import launch_pdl, w4_launch
from optimum_freeact.kernels.reference import Rows, Weight
from optimum_freeact.kernels.triton_state import DOT_TYPE, INTERPRETED


@triton.jit
def nibbles(w, PLAIN: tl.constexpr):
    """Low and high nibbles of bytes, as int8 from 0 to 15."""
    if PLAIN:
        low = (w & 0xF).to(tl.int8)
        high = (w >> 4).to(tl.int8)
    else:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; and.b32 a, $2, 0x0F0F0F0F; shr.u32 b, $2, 4; and.b32 b, b, 0x0F0F0F0F;"
            " mov.b32 $0, a; mov.b32 $1, b; }",
            "=r,=r,r",
            [w],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def of_outputs(qscale_ptr, row_sum_ptr, outs, m):
    """Scales of the outputs and sums of their codes."""
    is_out = outs < m
    return tl.load(qscale_ptr + outs, mask=is_out, other=0.0), tl.load(row_sum_ptr + outs, mask=is_out, other=0)


@triton.jit
def _w4_linear(
    codes_ptr, stats_ptr, branch_ptr, types_ptr, w_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr,
    bias_ptr, columns_ptr, y_ptr, n, m, n_bias, partial_ptr, count_ptr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr, MARKS: tl.constexpr, PR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, EARLY: tl.constexpr, PLAIN: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    part = tl.program_id(1)
    m_blocks = tl.cdiv(m, BN)
    pid_n, pid_m = tile_order(pid, n, m, BM, BN, GROUP)
    tokens = pid_n * BM + tl.arange(0, BM)
    outs = pid_m * BN + tl.arange(0, BN)
    safe_tokens = tl.where(tokens < n, tokens, 0).to(tl.int64)
    safe_outs = tl.where(outs < m, outs, 0).to(tl.int64)
    k = tl.arange(0, BK)
    w_ptrs = w_ptr + safe_outs[:, None] * HALF + k[None, :]
    even_ptrs = codes_ptr + safe_tokens[None, :] * (2 * HALF) + k[:, None]
    acc = tl.zeros((BN, BM), tl.int32)
    STEPS: tl.constexpr = (HALF + BK - 1) // BK
    PER_PART: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    scales = low_rank_scale_ptr
    if RANK > 0:
        scales = scales_of(low_rank_scale_ptr, pid_m * BN, RANK, UNIT)
    if EARLY:  # what the weight brings to the end is on its way while the rows are still being made
        qscale, row_sum = of_outputs(qscale_ptr, row_sum_ptr, outs, m)
        biases = biases_of(bias_ptr, types_ptr, tokens, outs, n, m, HAS_BIAS, KINDS)
        of_weight = branch_of_weight(low_rank_ptr, scales, columns_ptr, outs, m, RANK, MARKS, PR)
        if RANK == 0:
            types = branch_of_rows(branch_ptr, types_ptr, tokens, n, RANK, MARKS, PR)
            right = marks_of(types, n_bias, RANK, MARKS, PR)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for step in range(part * PER_PART, tl.minimum((part + 1) * PER_PART, STEPS)):
        at = step * BK
        if HALF % BK == 0:
            w = tl.load(w_ptrs + at)
            even = tl.load(even_ptrs + at)
            odd = tl.load(even_ptrs + at + HALF)
        else:  # codes beyond the row are zeros, so what the weight holds there does not count
            w = tl.load(w_ptrs + at, mask=(k + at < HALF)[None, :], other=0)
            even = tl.load(even_ptrs + at, mask=(k + at < HALF)[:, None], other=0)
            odd = tl.load(even_ptrs + at + HALF, mask=(k + at < HALF)[:, None], other=0)
        low, high = nibbles(w, PLAIN)
        acc = tl.dot(low, even, acc, out_dtype=tl.int32)
        acc = tl.dot(high, odd, acc, out_dtype=tl.int32)
    if SPLIT > 1:
        here = outs[:, None] * BM + tl.arange(0, BM)[None, :]  # partial sums: (SPLIT, m_blocks * BN, BM)
        own = partial_ptr + (part * m_blocks * BN * BM + here)
        tl.store(own, acc)
        if not arrived_last(count_ptr + pid, SPLIT):
            return
    # all that is still missing is asked for at once, before any of it is looked at; last what goes through shared memory, which waits
    is_token = tokens < n
    scale = tl.load(stats_ptr + tokens, mask=is_token, other=0.0)
    offset = tl.load(stats_ptr + n + tokens, mask=is_token, other=0.0)
    total = tl.load(stats_ptr + 2 * n + tokens, mask=is_token, other=0.0)
    if RANK > 0 or not EARLY:
        right = branch_of_rows(branch_ptr, types_ptr, tokens, n, RANK, MARKS, PR)
    if not EARLY:
        qscale, row_sum = of_outputs(qscale_ptr, row_sum_ptr, outs, m)
        biases = biases_of(bias_ptr, types_ptr, tokens, outs, n, m, HAS_BIAS, KINDS)
        of_weight = branch_of_weight(low_rank_ptr, scales, columns_ptr, outs, m, RANK, MARKS, PR)
        right = marks_of(right, n_bias, RANK, MARKS, PR)
    if SPLIT > 1:
        acc = tl.zeros((BN, BM), tl.int32)
        for other in range(SPLIT):
            acc += tl.load(partial_ptr + (other * m_blocks * BN * BM + here), cache_modifier=".cg")
    y = scaled(acc - 8 * total.to(tl.int32)[None, :], scale, offset, row_sum, qscale)
    y = add_bias(y, biases, bias_ptr, types_ptr, tokens, outs, n, m, n_bias, HAS_BIAS, KINDS)
    y = add_branch(y, of_weight, right, RANK, MARKS, DOT)
    store_outputs(y_ptr, y, tokens, outs, n, m)


def w4_linear(
    rows: Rows,
    types: torch.Tensor | None,
    weight: Weight,
    out_dtype: torch.dtype,
    *,
    options: dict | None = None,
) -> torch.Tensor:
    """Output `(n, m)` of rounded rows; `options` overrides launch settings."""
    n, d = rows.codes.shape
    m, half = weight.packed.shape
    y = torch.empty(n, m, dtype=out_dtype, device=rows.codes.device)
    if n == 0:
        return y
    bias, low_rank = weight.type_bias, weight.low_rank
    rank = 0 if low_rank is None else low_rank.shape[1]
    kinds, columns = further_types(rows, types, weight)
    launch = {**w4_launch(n, m, half), **(options or {})}
    blocks = -(-n // launch["BM"]) * -(-m // launch["BN"])
    split = launch["SPLIT"]
    partial, count = room_for_parts(split, n, m, launch, torch.int32, y.device)
    width = 16 if rows.branch is None else rows.branch.shape[1]
    pdl = launch_pdl(launch["pdl"])
    start(
        _w4_linear, (blocks, split),
        (rows.codes, rows.stats, rows.branch, types, weight.packed, weight.qscale, weight.row_sum, low_rank,
        weight.low_rank_scale, bias, columns, y, n, m, 1 if bias is None else len(bias), partial, count), HALF=half,
        HAS_BIAS=bias is not None, KINDS=kinds, MARKS=0 if columns is None else columns.shape[1], RANK=rank, PR=width, BM=launch["BM"], BN=launch["BN"], BK=launch["BK"],
        GROUP=launch["GROUP"], SPLIT=split, UNIT=scale_outputs(weight), EARLY=launch["early"], PLAIN=INTERPRETED, DOT=DOT_TYPE, PDL=bool(pdl),
        num_warps=launch["warps"], num_stages=launch["stages"], maxnreg=launch["registers"], **pdl,
    )  # fmt: skip
    return y
