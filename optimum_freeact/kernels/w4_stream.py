"""Gluon, Hopper only: few rows of codes times a packed 4-bit weight (`reference.w4_linear`), as fast as memory brings the weight.

The weight is one stream of pieces of 128 outputs by 128 bytes, outputs outermost. Each program takes an equal run of it and
starts at once: while the rows are still being rounded (programmatic dependent launch) one warp has already asked for as many
pieces as shared memory holds. A second warp brings the codes that belong to each piece once they are there; a warpgroup takes
nibbles apart in registers and multiplies. Outputs whose pieces lie in the runs of several programs are summed by the last of
them to arrive; sums of integers do not depend on the order.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from optimum_freeact.kernels.launches import launch_pdl
from optimum_freeact.kernels.reference import Rows, Weight
from optimum_freeact.kernels.w4_hopper import _described, _high, _low, _processors
from optimum_freeact.kernels.w4_triton import counters


@gluon.jit
def _bring_weights(
    w_desc, w_ring, full, empty, first, last,
    STEPS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for unit in range(first, last):
        count = unit - first
        slot = count % STAGES
        mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
        ready = full.index(slot)
        mbarrier.expect(ready, BN * BK)
        at = [(unit // STEPS) * BN, (unit % STEPS) * BK]
        tma.async_copy_global_to_shared(w_desc, at, ready, w_ring.index(slot))


@gluon.jit
def _bring_codes(
    codes_desc, even_ring, odd_ring, full, empty, first, last,
    STEPS: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    for unit in range(first, last):
        count = unit - first
        slot = count % STAGES
        mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
        ready = full.index(slot)
        mbarrier.expect(ready, 2 * BM * BK)
        at = (unit % STEPS) * BK
        tma.async_copy_global_to_shared(codes_desc, [0, at], ready, even_ring.index(slot))
        tma.async_copy_global_to_shared(codes_desc, [0, HALF + at], ready, odd_ring.index(slot))


@gluon.jit
def _multiply(
    w_ring, even_ring, odd_ring, w_full, codes_full, empty, pair, first, last, per, stats_ptr, branch_ptr, types_ptr,
    qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, y_ptr, partial_ptr, count_ptr, n, m, n_bias,
    STEPS: gl.constexpr, HAS_TYPES: gl.constexpr, HAS_BIAS: gl.constexpr, RANK: gl.constexpr, PR: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32])
    float_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4)
    branch_left: gl.constexpr = gl.DotOperandLayout(0, float_layout, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 * 4 // PR, PR // 4], [4, 1], [1, 0])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    part = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, acc_layout)) * BM, 1)
    part += gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, acc_layout)), 0)
    if PDL:
        gdc_wait()
    if RANK > 0:  # the same for all outputs
        c = gl.arange(0, PR, gl.SliceLayout(0, load_layout))
        rows = gl.arange(0, BM, gl.SliceLayout(1, load_layout))
        wanted = gl.expand_dims(rows < n, 1) & gl.expand_dims(c < RANK, 0)
        right = gl.load(branch_ptr + gl.expand_dims(rows * PR, 1) + gl.expand_dims(c, 0), mask=wanted, other=0.0)
        right *= gl.expand_dims(gl.load(low_rank_scale_ptr + c, mask=c < RANK, other=0.0), 0)
        upper = right.to(gl.bfloat16)
        pair.index(0).store((right - upper.to(gl.float32)).to(gl.bfloat16))
        pair.index(1).store(upper)
        fence_async_shared()
    tokens = gl.arange(0, BM, gl.SliceLayout(0, float_layout))
    is_token = tokens < n
    scale = gl.load(stats_ptr + tokens, mask=is_token, other=0.0) * 0.0625
    offset = gl.load(stats_ptr + n + tokens, mask=is_token, other=0.0)
    if HAS_TYPES:
        kind = gl.minimum(gl.load(types_ptr + tokens, mask=is_token, other=0).to(gl.int32), n_bias - 1)
    unit = first
    while unit < last:
        block = unit // STEPS
        begin = unit
        end = gl.minimum((block + 1) * STEPS, last)
        outs = block * BN + gl.arange(0, BN, gl.SliceLayout(1, float_layout))
        is_out = outs < m
        row_sum = gl.load(row_sum_ptr + outs, mask=is_out, other=0)
        qscale = gl.load(qscale_ptr + outs, mask=is_out, other=0.0)
        if HAS_BIAS:
            bias = gl.load(bias_ptr + outs, mask=is_out, other=0.0)
        if RANK > 0:
            r = gl.arange(0, PR, gl.SliceLayout(0, branch_left))
            lines = block * BN + gl.arange(0, BN, gl.SliceLayout(1, branch_left))
            is_line = gl.expand_dims(lines < m, 1) & gl.expand_dims(r < RANK, 0)
            left = gl.load(
                low_rank_ptr + gl.expand_dims(lines * RANK, 1) + gl.expand_dims(r, 0), mask=is_line, other=0
            )
        acc = gl.zeros((BN, BM), gl.int32, acc_layout)
        for at in range(begin, end):
            slot = (at - first) % STAGES
            phase = ((at - first) // STAGES) & 1
            mbarrier.wait(w_full.index(slot), phase)
            w = w_ring.index(slot).load(left_layout)
            low, high = _low(w), _high(w)
            mbarrier.wait(codes_full.index(slot), phase)
            acc = warpgroup_mma(low, even_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(high, odd_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty.index(slot))
        unit = end
        done = True
        if (begin > block * STEPS) | (end < (block + 1) * STEPS):  # other programs have the rest
            mine = gl.program_id(0) * 2 + (begin == block * STEPS).to(gl.int32)
            gl.store(partial_ptr + mine * (BN * BM) + part, acc)
            gl.thread_barrier()
            low_program = (block * STEPS) // per
            high_program = gl.minimum(((block + 1) * STEPS - 1) // per, gl.num_programs(0) - 1)
            arrived = gl.atomic_add(count_ptr + block, 1, sem="acq_rel")
            done = arrived == high_program - low_program
            if done:
                gl.store(count_ptr + block, 0)  # ready for the next launch
                acc = gl.zeros((BN, BM), gl.int32, acc_layout)
                for program in range(low_program, high_program + 1):
                    theirs = program * 2 + (program * per <= block * STEPS).to(gl.int32)
                    acc += gl.load(partial_ptr + theirs * (BN * BM) + part, cache_modifier=".cg")
        if done:
            y = gl.convert_layout(acc, float_layout).to(gl.float32) * gl.expand_dims(scale, 0)
            y += gl.expand_dims(offset, 0) * gl.expand_dims(row_sum.to(gl.float32), 1)
            y *= gl.expand_dims(qscale, 1)
            if HAS_BIAS:
                y += gl.expand_dims(bias, 1)
                if HAS_TYPES:
                    for other in range(1, n_bias):
                        change = gl.load(bias_ptr + other * m + outs, mask=is_out, other=0.0) - bias
                        y += gl.where(gl.expand_dims(kind == other, 0), gl.expand_dims(change, 1), 0.0)
            if RANK > 0:
                left_16 = left.to(gl.bfloat16)
                y = warpgroup_mma(left_16, pair.index(0).permute((1, 0)), y, is_async=True)
                y = warpgroup_mma(left_16, pair.index(1).permute((1, 0)), y, is_async=True)
                y = warpgroup_mma_wait(0, [y])
            turned = gl.convert_layout(gl.permute(y.to(y_ptr.dtype.element_ty), (1, 0)), out_layout)
            row = gl.arange(0, BM, gl.SliceLayout(1, out_layout))
            column = block * BN + gl.arange(0, BN, gl.SliceLayout(0, out_layout))
            gl.store(
                y_ptr + gl.expand_dims(row * m, 1) + gl.expand_dims(column, 0), turned,
                mask=gl.expand_dims(row < n, 1) & gl.expand_dims(column < m, 0),
            )  # fmt: skip


@gluon.jit
def _w4_stream(
    w_desc, codes_desc, stats_ptr, branch_ptr, types_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr,
    bias_ptr, y_ptr, partial_ptr, count_ptr, n, m, n_bias, per,
    HALF: gl.constexpr, HAS_TYPES: gl.constexpr, HAS_BIAS: gl.constexpr, RANK: gl.constexpr, PR: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = HALF // BK
    branch: gl.constexpr = gl.NVMMASharedLayout(2 * PR if PR < 64 else 128, 16)
    w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, BN, BK], w_desc.layout)
    even_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], codes_desc.layout)
    odd_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], codes_desc.layout)
    pair = gl.allocate_shared_memory(gl.bfloat16, [2, BM, PR], branch)
    w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    codes_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(w_full.index(s), count=1)
        mbarrier.init(codes_full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    if PDL:
        gdc_launch_dependents()
    first = gl.program_id(0) * per
    last = gl.minimum(first + per, gl.cdiv(m, BN) * STEPS)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    w_ring, even_ring, odd_ring, w_full, codes_full, empty, pair, first, last, per, stats_ptr,
                    branch_ptr, types_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, y_ptr,
                    partial_ptr, count_ptr, n, m, n_bias, STEPS, HAS_TYPES, HAS_BIAS, RANK, PR, BM, BN, STAGES,
                    PDL,
                ),
            ),
            (_bring_weights, (w_desc, w_ring, w_full, empty, first, last, STEPS, BN, BK, STAGES)),
            (
                _bring_codes,
                (codes_desc, even_ring, odd_ring, codes_full, empty, first, last, STEPS, HALF, BM, BK, STAGES, PDL),
            ),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip


BN, BK = 128, 128  # outputs and bytes of a piece
ROOM = 180_000  # bytes of shared memory for pieces: the kernels that round need theirs beside it


def w4_linear(
    rows: Rows,
    types: torch.Tensor | None,
    weight: Weight,
    out_dtype: torch.dtype,
    *,
    options: dict | None = None,
) -> torch.Tensor:
    """Output `(n, m)` of up to 64 rounded rows, as `w4_triton.w4_linear`."""
    n = len(rows.codes)
    m, half = weight.packed.shape
    y = torch.empty(n, m, dtype=out_dtype, device=rows.codes.device)
    bias, low_rank = weight.type_bias, weight.low_rank
    n_bias = 0 if bias is None else len(bias)
    if n_bias == 1:
        types = None
    launch = {"room": ROOM, "pdl": True, **(options or {})}
    bm = 16 if n <= 16 else 32 if n <= 32 else 64
    units = triton.cdiv(m, BN) * (half // BK)
    per = triton.cdiv(units, _processors(y.device))
    programs = triton.cdiv(units, per)
    stages = max(2, min(per, launch["room"] // (BK * (BN + 2 * bm))))
    partial = torch.empty(programs * 2 * BN * bm, dtype=torch.int32, device=y.device)
    pdl = launch_pdl(launch["pdl"])
    _w4_stream[(programs,)](
        _described(weight.packed, BN, BK, BK), _described(rows.codes, bm, BK, BK), rows.stats, rows.branch, types,
        weight.qscale, weight.row_sum, low_rank, weight.low_rank_scale, bias, y, partial, counters(y.device), n, m,
        n_bias, per, HALF=half, HAS_TYPES=types is not None, HAS_BIAS=bias is not None,
        RANK=0 if low_rank is None else low_rank.shape[1], PR=32 if rows.branch is None else rows.branch.shape[1],
        BM=bm, BN=BN, BK=BK, STAGES=stages, PDL=bool(pdl), num_warps=4, maxnreg=96, **pdl,
    )  # fmt: skip
    return y
