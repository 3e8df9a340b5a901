"""Gluon, Hopper only: few rows of codes times a packed 4-bit weight (`reference.w4_linear`), weights on their way before the codes.

The weight is one stream of pieces of 128 outputs by 128 bytes, outputs outermost, and each program takes an equal run of it, so
that all end together. One warp brings pieces by the copy engine as soon as the program starts, while the rows are still being
rounded (programmatic dependent launch), a few at a time: asked for all at once they would stand before what the rounding
reads. Another brings the codes that belong to each piece once they are there; two warpgroups take nibbles apart in registers
and multiply, half of the outputs each. Outputs whose pieces lie in the runs of several programs are summed by the last of them
to arrive: sums of whole numbers do not depend on the order.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from optimum_freeact.kernels.epilogue_triton import COUNTERS, counters, scale_outputs
from optimum_freeact.kernels.feed_hopper import barrier, bring
from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import launch_pdl, stream_launch
from optimum_freeact.kernels.nibbles_gluon import high_codes, low_codes
from optimum_freeact.kernels.reference import Rows, Weight
from optimum_freeact.kernels.w4_hopper import described, processors


@gluon.jit
def _bring_weights(
    w_desc, w_ring, full, empty, first, last,
    STEPS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    for unit in range(first, last):
        count = unit - first
        slot = count % STAGES
        if count >= DEPTH:  # few pieces at a time are under way
            mbarrier.wait(full.index((count - DEPTH) % STAGES), ((count - DEPTH) // STAGES) & 1)
        mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
        ready = full.index(slot)
        mbarrier.expect(ready, BN * BK)
        at = [(unit // STEPS) * BN, (unit % STEPS) * BK]
        bring(w_desc, at, ready, w_ring.index(slot))


@gluon.jit
def _bring_codes(
    codes_desc, even_ring, odd_ring, full, empty, first, last,
    STEPS: gl.constexpr, HALF: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for unit in range(first, last):
        count = unit - first
        slot = count % STAGES
        mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
        ready = full.index(slot)
        mbarrier.expect(ready, 2 * BM * BK)
        at = (unit % STEPS) * BK
        bring(codes_desc, [0, at], ready, even_ring.index(slot))
        bring(codes_desc, [0, HALF + at], ready, odd_ring.index(slot))


@gluon.jit
def _multiply(
    given, WHICH: gl.constexpr,
    STEPS: gl.constexpr, HAS_BIAS: gl.constexpr, KINDS: gl.constexpr, RANK: gl.constexpr, PR: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One half of each piece's outputs."""
    (
        w_ring, even_ring, odd_ring, w_full, codes_full, empty, pairs, first, last, per, stats_ptr, branch_ptr, types_ptr,
        qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, y_ptr, partial_ptr, count_ptr, n, m,
    ) = given  # fmt: skip
    OWN: gl.constexpr = BN // 2
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32])
    float_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 4)
    branch_left: gl.constexpr = gl.DotOperandLayout(0, float_layout, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 * 4 // PR, PR // 4], [4, 1], [1, 0])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    part = gl.expand_dims(gl.arange(0, OWN, gl.SliceLayout(1, acc_layout)) * BM, 1)
    part += gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, acc_layout)), 0)
    tokens = gl.arange(0, BM, gl.SliceLayout(0, float_layout))
    is_token = tokens < n
    if KINDS > 0:  # there since the model's own hook ran, long before
        kind = gl.minimum(gl.load(types_ptr + tokens, mask=is_token, other=0).to(gl.int32), KINDS)
    c = gl.arange(0, PR, gl.SliceLayout(0, load_layout))
    rows = gl.arange(0, BM, gl.SliceLayout(1, load_layout))
    wanted = gl.expand_dims(rows < n, 1) & gl.expand_dims(c < RANK, 0)
    if PDL:
        gdc_wait()
    scale = gl.load(stats_ptr + tokens, mask=is_token, other=0.0) * 0.0625
    offset = gl.load(stats_ptr + n + tokens, mask=is_token, other=0.0)
    if RANK > 0:
        coordinates = gl.load(branch_ptr + gl.expand_dims(rows * PR, 1) + gl.expand_dims(c, 0), mask=wanted, other=0.0)
    unit = first
    while unit < last:
        block = unit // STEPS
        begin = unit
        end = gl.minimum((block + 1) * STEPS, last)
        first_out = block * BN + WHICH * OWN
        outs = first_out + gl.arange(0, OWN, gl.SliceLayout(1, float_layout))
        is_out = outs < m
        row_sum = gl.load(row_sum_ptr + outs, mask=is_out, other=0)
        qscale = gl.load(qscale_ptr + outs, mask=is_out, other=0.0)
        if HAS_BIAS:
            bias = gl.load(bias_ptr + outs, mask=is_out, other=0.0)
        if KINDS > 0:  # asked for together: at the end nothing would hide their way
            one = gl.load(bias_ptr + m + outs, mask=is_out, other=0.0)
        if KINDS > 1:
            two = gl.load(bias_ptr + 2 * m + outs, mask=is_out, other=0.0)
        if KINDS > 2:
            three = gl.load(bias_ptr + 3 * m + outs, mask=is_out, other=0.0)
        if RANK > 0:
            scales = low_rank_scale_ptr
            if UNIT > 0:
                scales = low_rank_scale_ptr + (first_out // UNIT) * RANK
            column_scale = gl.load(scales + c, mask=c < RANK, other=0.0)
            r = gl.arange(0, PR, gl.SliceLayout(0, branch_left))
            lines = first_out + gl.arange(0, OWN, gl.SliceLayout(1, branch_left))
            is_line = gl.expand_dims(lines < m, 1) & gl.expand_dims(r < RANK, 0)
            left = gl.load(
                low_rank_ptr + gl.expand_dims(lines * RANK, 1) + gl.expand_dims(r, 0), mask=is_line, other=0
            )
            right = coordinates * gl.expand_dims(column_scale, 0)
            upper = right.to(gl.bfloat16)
            pairs.index(2 * WHICH).store((right - upper.to(gl.float32)).to(gl.bfloat16))
            pairs.index(2 * WHICH + 1).store(upper)
            fence_async_shared()
        acc = gl.zeros((OWN, BM), gl.int32, acc_layout)
        for at in range(begin, end):
            slot = (at - first) % STAGES
            phase = ((at - first) // STAGES) & 1
            mbarrier.wait(w_full.index(slot), phase)
            w = w_ring.index(slot).slice(WHICH * OWN, OWN, 0).load(left_layout)
            low, high = low_codes(w), high_codes(w)
            mbarrier.wait(codes_full.index(slot), phase)
            acc = warpgroup_mma(low, even_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(high, odd_ring.index(slot).permute((1, 0)), acc, is_async=True)
            # registers that hold nibbles may not change before their products have ended
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty.index(slot))
        unit = end
        done = True
        if (begin > block * STEPS) | (end < (block + 1) * STEPS):  # other programs have the rest
            mine = (gl.program_id(0) * 2 + (begin == block * STEPS).to(gl.int32)) * 2 + WHICH
            gl.store(partial_ptr + mine * (OWN * BM) + part, acc)
            barrier()
            low_program = (block * STEPS) // per
            high_program = gl.minimum(((block + 1) * STEPS - 1) // per, gl.num_programs(0) - 1)
            arrived = gl.atomic_add(count_ptr + 2 * block + WHICH, 1, sem="acq_rel")
            done = arrived == high_program - low_program
            if done:
                gl.store(count_ptr + 2 * block + WHICH, 0)  # ready for the next launch
                acc = gl.zeros((OWN, BM), gl.int32, acc_layout)
                for program in range(low_program, high_program + 1):
                    theirs = (program * 2 + (program * per <= block * STEPS).to(gl.int32)) * 2 + WHICH
                    acc += gl.load(partial_ptr + theirs * (OWN * BM) + part, cache_modifier=".cg")
        if done:
            taken = gl.expand_dims(offset, 0) * gl.expand_dims(row_sum.to(gl.float32), 1)
            y = gl.fma(gl.convert_layout(acc, float_layout).to(gl.float32), gl.expand_dims(scale, 0), taken)
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
                left_16 = left.to(gl.bfloat16)
                y = warpgroup_mma(left_16, pairs.index(2 * WHICH).permute((1, 0)), y, is_async=True)
                y = warpgroup_mma(left_16, pairs.index(2 * WHICH + 1).permute((1, 0)), y, is_async=True)
                y = warpgroup_mma_wait(0, [y])
            turned = gl.convert_layout(gl.permute(y.to(y_ptr.dtype.element_ty), (1, 0)), out_layout)
            row = gl.arange(0, BM, gl.SliceLayout(1, out_layout))
            column = first_out + gl.arange(0, OWN, gl.SliceLayout(0, out_layout))
            gl.store(
                y_ptr + gl.expand_dims(row * m, 1) + gl.expand_dims(column, 0), turned,
                mask=gl.expand_dims(row < n, 1) & gl.expand_dims(column < m, 0),
            )  # fmt: skip


@gluon.jit
def _w4_stream(
    w_desc, codes_desc, stats_ptr, branch_ptr, types_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr,
    bias_ptr, y_ptr, partial_ptr, count_ptr, n, m, per,
    HALF: gl.constexpr, HAS_BIAS: gl.constexpr, KINDS: gl.constexpr, RANK: gl.constexpr, PR: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr,
    UNIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = HALF // BK
    branch: gl.constexpr = gl.NVMMASharedLayout(2 * PR if PR < 64 else 128, 16)
    w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, BN, BK], w_desc.layout)
    even_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], codes_desc.layout)
    odd_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], codes_desc.layout)
    pairs = gl.allocate_shared_memory(gl.bfloat16, [4, BM, PR], branch)
    w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    codes_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(w_full.index(s), count=1)
        mbarrier.init(codes_full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    first = gl.program_id(0) * per
    last = gl.minimum(first + per, gl.cdiv(m, BN) * STEPS)
    given = (
        w_ring, even_ring, odd_ring, w_full, codes_full, empty, pairs, first, last, per, stats_ptr, branch_ptr, types_ptr,
        qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, y_ptr, partial_ptr, count_ptr, n, m,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (given, 0, STEPS, HAS_BIAS, KINDS, RANK, PR, BM, BN, STAGES, UNIT, PDL)),
            (_multiply, (given, 1, STEPS, HAS_BIAS, KINDS, RANK, PR, BM, BN, STAGES, UNIT, PDL)),
            (_bring_weights, (w_desc, w_ring, w_full, empty, first, last, STEPS, BN, BK, STAGES, DEPTH)),
            (
                _bring_codes,
                (codes_desc, even_ring, odd_ring, codes_full, empty, first, last, STEPS, HALF, BM, BK, STAGES, PDL),
            ),
        ],
        [4, 1, 1],
        [104, 24, 24],
    )  # fmt: skip


BN, BK = 128, 128  # outputs and bytes of a piece


def runs(m: int, half: int, count: int, whole: float) -> tuple[int, int]:
    """Pieces of a program, and programs, on `count` multiprocessors: blocks of outputs as they are where there are at least `whole`
    of a block for each multiprocessor and no more than one, so that nothing is left to sum; else equal runs.
    """
    blocks, steps = -(-m // BN), half // BK
    per = -(-blocks * steps // count)
    if per < steps and blocks >= whole * count:
        per = steps
    return per, -(-blocks * steps // per)


def w4_linear(
    rows: Rows,
    types: torch.Tensor | None,
    weight: Weight,
    out_dtype: torch.dtype,
    *,
    options: dict | None = None,
) -> torch.Tensor:
    """Output `(n, m)` of few rounded rows, see [`dispatch.stream_choice`]; `options` overrides launch settings."""
    n = len(rows.codes)
    m, half = weight.packed.shape
    if half % BK or 2 * -(-m // BN) > COUNTERS:
        raise ValueError(
            f"Rows of {half} bytes and {m} outputs: pieces are of {BK} bytes, outputs at most {COUNTERS // 2 * BN}."
        )
    y = torch.empty(n, m, dtype=out_dtype, device=rows.codes.device)
    bias, low_rank = weight.type_bias, weight.low_rank
    launch = stream_launch(n, options or {})
    bm = launch["BM"]
    if n > bm:
        raise ValueError(f"{n} rows in a tile of BM={bm}.")
    per, programs = runs(m, half, processors(y.device), launch["whole"])
    stages = max(2, min(per, launch["room"] // (BK * (BN + 2 * bm))))
    partial = torch.empty(programs * 2 * BN * bm, dtype=torch.int32, device=y.device)
    pdl = launch_pdl(launch["pdl"])
    start(
        _w4_stream, (programs,),
        (described(weight.packed, BN, BK, BK), described(rows.codes, bm, BK, BK), rows.stats, rows.branch, types,
        weight.qscale, weight.row_sum, low_rank, weight.low_rank_scale, bias, y, partial, counters(y.device), n, m,
        per), HALF=half, HAS_BIAS=bias is not None, KINDS=0 if bias is None or types is None else len(bias) - 1,
        RANK=0 if low_rank is None else low_rank.shape[1], PR=16 if low_rank is None or rows.branch is None else rows.branch.shape[1],
        BM=bm, BN=BN, BK=BK, STAGES=stages, DEPTH=min(launch["depth"], stages - 1), UNIT=scale_outputs(weight),
        PDL=bool(pdl), num_warps=4, maxnreg=launch["registers"], **pdl,
    )  # fmt: skip
    return y
