"""Gluon, Hopper only: rows without a branch in one pass, as `rounding_pass_triton`, with few waits for each other.

The copy engine brings the next row of a program while the one before is still being rounded. In shared memory a row becomes
float16 in its own place. Both products leave what each warp holds in registers, where the second one's left operand must
be; columns of the right factor are dealt out so that the codes of a thread lie behind each other in memory, and leave without
another way through shared memory. Warps meet four times a row: at the largest magnitude, before the products, at the extremes,
and at the sum of the codes.
"""

from __future__ import annotations

from functools import cache

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

from optimum_freeact.kernels.feed_hopper import barrier as meet
from optimum_freeact.kernels.feed_hopper import bring
from optimum_freeact.kernels.grids_triton import MAGIC, MAGIC_BITS
from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import launch_pdl, pass_hopper_launch
from optimum_freeact.kernels.reference import HEADROOM, Rows
from optimum_freeact.kernels.rounding_triton import outputs
from optimum_freeact.kernels.tables import InputTables, padded
from optimum_freeact.kernels.w4_hopper import described, processors


STEP = gl.constexpr(MAGIC.value)
STEP_BITS = gl.constexpr(MAGIC_BITS.value)


@gluon.jit
def _grid(low, high, clip, unit, QMIN: gl.constexpr, QMAX: gl.constexpr, SYMMETRIC: gl.constexpr):
    """As `grids_triton.grid_of`."""
    if SYMMETRIC:
        scale = gl.maximum(gl.abs(low), gl.abs(high)) * clip / (QMAX + 0.5)
        scale = gl.where(scale > 0, scale, unit)
        offset = scale * 0.0
    else:
        middle = high / 2 + low / 2
        half = (high / 2 - low / 2) * clip
        scale = half / ((QMAX - QMIN) / 2)
        offset = middle - half - scale * QMIN
        scale = gl.where(half > 0, scale, unit)
        offset = gl.where(half > 0, offset, middle)
    return scale, offset


@gluon.jit
def _saturated(z, factor, shift):
    """`z * factor + shift` between 0 and 1, in one instruction."""
    factor, shift = gl.to_tensor(factor), gl.to_tensor(shift)
    return gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [z, factor, shift], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _rows_of_worker(given, WHICH: gl.constexpr, SETTINGS: gl.constexpr):
    """Every WORKERS-th of a program's rows, one after the other, DEEP of them on their way at a time."""
    (
        x_desc, types_ptr, mean_ptr, reach_ptr, factor_ptr, clip_ptr, codes_ptr, stats_ptr, n, n_means, n_clips,
        ring, left, right, peaks, lows, highs, sums, ready, kinds,
    ) = given  # fmt: skip
    HAS_MEAN: gl.constexpr = SETTINGS[0]
    HAS_TYPES: gl.constexpr = SETTINGS[1]
    A: gl.constexpr = SETTINGS[2]
    B: gl.constexpr = SETTINGS[3]
    PA: gl.constexpr = SETTINGS[4]
    QMIN: gl.constexpr = SETTINGS[5]
    QMAX: gl.constexpr = SETTINGS[6]
    SYMMETRIC: gl.constexpr = SETTINGS[7]
    LIMIT: gl.constexpr = SETTINGS[8]
    KIND: gl.constexpr = SETTINGS[9]
    WARPS: gl.constexpr = SETTINGS[10]
    WORKERS: gl.constexpr = SETTINGS[11]
    DEEP: gl.constexpr = SETTINGS[12]
    SOON: gl.constexpr = SETTINGS[13]
    AHEAD: gl.constexpr = SETTINGS[14]
    WRITTEN: gl.constexpr = SETTINGS[15]
    D: gl.constexpr = A * B
    HALF: gl.constexpr = B // 2
    LINE: gl.constexpr = 256 // B  # lines of a tile that a warp reads at a time, eight numbers a thread
    ROUNDS: gl.constexpr = PA // (LINE * WARPS)
    read: gl.constexpr = gl.BlockedLayout([1, 8], [LINE, B // 8], [WARPS, 1], [1, 0])
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, B, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, acc, 2)
    everywhere: gl.constexpr = gl.BlockedLayout([WARPS], [32], [WARPS], [0])
    peaks, lows, highs, sums = peaks.index(WHICH), lows.index(WHICH), highs.index(WHICH), sums.index(WHICH)
    line = gl.arange(0, PA, gl.SliceLayout(1, read))
    column = gl.arange(0, B, gl.SliceLayout(0, read))
    place = gl.expand_dims(line, 1) * B + gl.expand_dims(column, 0)
    inside = gl.expand_dims(line < A, 1) & (gl.expand_dims(column, 0) >= 0)
    warp = gl.arange(0, WARPS, everywhere)
    out_line = gl.arange(0, PA, gl.SliceLayout(1, WRITTEN))
    out_column = gl.arange(0, B, gl.SliceLayout(0, WRITTEN))
    at = gl.where(out_column < HALF, out_column, out_column - HALF + A * HALF)
    target = gl.expand_dims(out_line, 1) * HALF + gl.expand_dims(at, 0)
    written = gl.expand_dims(out_line < A, 1) & (gl.expand_dims(out_column, 0) >= 0)
    factor = gl.load(factor_ptr)
    first = gl.program_id(0) * WORKERS + WHICH
    step = gl.num_programs(0) * WORKERS
    coming = kinds[WHICH]
    if HAS_MEAN and AHEAD:
        mean = gl.load(mean_ptr + gl.minimum(coming, n_means - 1) * D + place, mask=inside, other=0.0)
    count = 0
    for row in range(first, n, step):
        slot = WHICH * DEEP + count % DEEP
        tile, full = ring.index(slot), ready.index(slot)
        later = row + DEEP * step
        kind = gl.minimum(coming, n_means - 1)
        clip = gl.load(clip_ptr + gl.minimum(coming, n_clips - 1))
        bound = 0.0
        if HAS_MEAN:
            bound = gl.load(reach_ptr + kind)
            if not AHEAD:
                mean = gl.load(mean_ptr + kind * D + place, mask=inside, other=0.0)
        if HAS_TYPES:
            coming = gl.load(types_ptr + gl.minimum(row + step, n - 1)).to(gl.int32)
        mbarrier.wait(full, (count // DEEP) & 1)
        count += 1
        u = tile.load(read).to(KIND, bitcast=True).to(gl.float32)
        if A != PA:
            u = gl.where(inside, u, 0.0)
        peak = gl.max(gl.abs(u).reshape([ROUNDS, WARPS, LINE * B]), 0)
        peaks.store(gl.max(peak, 1))
        bound += gl.max(peaks.load(everywhere), 0)
        if HAS_MEAN:
            u -= mean.to(gl.float32)
        undo = gl.maximum(bound, 1e-30) / LIMIT
        tile.store((u * (1.0 / undo)).to(gl.float16))
        fence_async_shared()
        meet()
        y = warpgroup_mma(left, tile, gl.zeros((PA, B), gl.float32, acc), use_acc=False, is_async=True)
        y = warpgroup_mma_wait(0, [y])
        if SOON:
            meet()
            if later < n:
                mbarrier.expect(full, PA * B * 2)
                bring(x_desc, [later * A, 0], full, tile)
        y = gl.convert_layout(y.to(gl.float16), operand)
        z = warpgroup_mma(y, right, gl.zeros((PA, B), gl.float32, acc), use_acc=False, is_async=True)
        z = warpgroup_mma_wait(0, [z])
        of_warps = z.reshape([WARPS, 16 * B])  # lines that pad a tile repeat its first one
        lows.store(gl.min(of_warps, 1))
        highs.store(gl.max(of_warps, 1))
        low = gl.min(lows.load(everywhere), 0)
        high = gl.max(highs.load(everywhere), 0)
        if not SOON:
            if later < n:  # all warps have met since the first product, so the row's memory is free
                mbarrier.expect(full, PA * B * 2)
                bring(x_desc, [later * A, 0], full, tile)
        if HAS_MEAN and AHEAD:
            mean = gl.load(mean_ptr + gl.minimum(coming, n_means - 1) * D + place, mask=inside, other=0.0)
        undo *= factor
        good = gl.abs(high - low) < float("inf")
        scale, offset = _grid(low, high, clip, 1.0 / undo, QMIN, QMAX, SYMMETRIC)
        inverse = 1.0 / scale
        share = _saturated(z, inverse / (QMAX - QMIN), (-offset * inverse - QMIN) / (QMAX - QMIN))
        bits = (share * (QMAX - QMIN) + (STEP + QMIN)).to(gl.int32, bitcast=True)
        sums.store(gl.sum((bits - STEP_BITS).reshape([WARPS, 16 * B]), 1))
        total = gl.sum(gl.where(warp * 16 < A, sums.load(everywhere), 0), 0)
        found = bits.to(gl.int8).reshape([PA, B // 8, 4, 2]).permute((0, 2, 1, 3)).reshape([PA, B])
        found = gl.convert_layout(found, WRITTEN)  # the same numbers in each thread, in another order
        # a compiled loop's `row` is a tensor
        gl.store(codes_ptr + row.to(gl.int64) * D + target, found, mask=written)  # type: ignore[attr-defined]
        if not good:
            gl.store(codes_ptr + row.to(gl.int64) * D + target, found ^ found, mask=written)  # type: ignore[attr-defined]
            total = 0
        nan = gl.where(good, 0.0, float("nan"))
        gl.store(stats_ptr + row, scale * undo + nan)
        gl.store(stats_ptr + n + row, offset * undo + nan)
        gl.store(stats_ptr + 2 * n + row, total.to(gl.float32))


@gluon.jit
def _round_tiles(
    x_desc, types_ptr, mean_ptr, reach_ptr, left_ptr, right_ptr, factor_ptr, clip_ptr, codes_ptr, stats_ptr,
    n, n_means, n_clips,
    HAS_TYPES: gl.constexpr, HAS_MEAN: gl.constexpr, A: gl.constexpr, B: gl.constexpr,
    PA: gl.constexpr, QMIN: gl.constexpr, QMAX: gl.constexpr, SYMMETRIC: gl.constexpr, LIMIT: gl.constexpr, KIND: gl.constexpr,
    WARPS: gl.constexpr, WORKERS: gl.constexpr, DEEP: gl.constexpr, SOON: gl.constexpr, AHEAD: gl.constexpr,
    WRITTEN: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(gl.float16, [WORKERS * DEEP, PA, B], swizzled)  # bits of rows, then their float16
    left = gl.allocate_shared_memory(gl.float16, [PA, PA], swizzled)
    right = gl.allocate_shared_memory(gl.float16, [B, B], swizzled)
    peaks = gl.allocate_shared_memory(gl.float32, [WORKERS, WARPS], flat)
    lows = gl.allocate_shared_memory(gl.float32, [WORKERS, WARPS], flat)
    highs = gl.allocate_shared_memory(gl.float32, [WORKERS, WARPS], flat)
    sums = gl.allocate_shared_memory(gl.int32, [WORKERS, WARPS], flat)
    ready = gl.allocate_shared_memory(gl.int64, [WORKERS * DEEP, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(WORKERS * DEEP):
        mbarrier.init(ready.index(s), count=1)
    if PDL and EARLY:
        gdc_launch_dependents()
    # the factors; column 8 k + 2 q + e of the right one is column q B / 4 + 2 k + e of a row of codes
    of_left: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PA, PA // 8], [WARPS, 1], [1, 0])
    i = gl.arange(0, PA, gl.SliceLayout(1, of_left))
    k = gl.arange(0, PA, gl.SliceLayout(0, of_left))
    left_values = gl.load(left_ptr + gl.expand_dims(i, 1) * PA + gl.expand_dims(k, 0))
    of_right: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [WARPS, 1], [1, 0])
    k = gl.arange(0, B, gl.SliceLayout(1, of_right))
    c = gl.arange(0, B, gl.SliceLayout(0, of_right))
    dealt = (c // 2 % 4) * (B // 4) + c // 8 * 2 + c % 2
    right_values = gl.load(right_ptr + gl.expand_dims(k, 1) * B + gl.expand_dims(dealt, 0))
    first = gl.program_id(0) * WORKERS
    kind_0, kind_1 = 0, 0
    if HAS_TYPES:  # there since the model's own hook ran, long before
        kind_0 = gl.load(types_ptr + first).to(gl.int32)
        kind_1 = gl.load(types_ptr + gl.minimum(first + 1, n - 1)).to(gl.int32)
    if PDL:
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    meet()
    for s in gl.static_range(WORKERS * DEEP):  # rows are on their way while the factors are
        row = first + s // DEEP + (s % DEEP) * gl.num_programs(0) * WORKERS
        if row < n:
            mbarrier.expect(ready.index(s), PA * B * 2)
            bring(x_desc, [row * A, 0], ready.index(s), ring.index(s))
    left.store(left_values)
    right.store(right_values)
    fence_async_shared()
    meet()
    given = (
        x_desc, types_ptr, mean_ptr, reach_ptr, factor_ptr, clip_ptr, codes_ptr, stats_ptr, n, n_means, n_clips,
        ring, left, right, peaks, lows, highs, sums, ready, (kind_0, kind_1),
    )  # fmt: skip
    settings: gl.constexpr = (
        HAS_MEAN, HAS_TYPES, A, B, PA, QMIN, QMAX, SYMMETRIC, LIMIT, KIND, WARPS, WORKERS, DEEP, SOON, AHEAD, WRITTEN,
    )  # fmt: skip
    if WORKERS == 1:
        _rows_of_worker(given, 0, settings)
    else:
        gl.warp_specialize(
            [(_rows_of_worker, (given, 0, settings)), (_rows_of_worker, (given, 1, settings))], [WARPS], [REGISTERS]
        )


@cache
def _written(pa: int, b: int) -> gl.DistributedLinearLayout:
    """The layout of codes that leave: a thread has a quarter of each of two lines, whose bytes lie behind each other."""
    bits = (b // 4).bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1 << s] for s in range(bits)] + [[8, 0]],
        lane_bases=[[0, b // 4], [0, b // 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16 << s, 0] for s in range((pa // 16).bit_length() - 1)],
        block_bases=[],
        shape=[pa, b],
    )


def round_rows(
    x: torch.Tensor, types: torch.Tensor | None, tables: InputTables, *, options: dict | None = None
) -> Rows:
    """As `rounding_pass_triton.round_rows`, for tables that `dispatch.hopper_rounding` names."""
    n, d = x.shape
    n_means, n_clips = tables.n_means, tables.n_clips
    rows = outputs(x, tables)
    if n == 0:
        return rows
    if n_clips == 1 and n_means == 1:
        types = None
    qmax = (1 << (tables.bits - 1)) - 1
    pa = padded(tables.a)
    launch = pass_hopper_launch(n, 2 * pa, tables.b, options or {})
    pdl = launch_pdl(launch["pdl"])
    lines = described(x.view(torch.float16).view(n * tables.a, tables.b), pa, tables.b, 128)
    programs = min(-(-n // launch["workers"]), launch["per_processor"] * processors(x.device))
    start(
        _round_tiles, (programs,),
        (lines, types, tables.mean, tables.reach, tables.left, tables.right, tables.factor, tables.clip,
        rows.codes, rows.stats, n, n_means, n_clips),
        HAS_TYPES=types is not None, HAS_MEAN=tables.mean is not None,
        A=tables.a, B=tables.b, PA=pa, QMIN=-qmax - 1, QMAX=qmax, SYMMETRIC=tables.symmetric, LIMIT=HEADROOM, KIND=gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16,
        WARPS=pa // 16, WRITTEN=_written(pa, tables.b), PDL=bool(pdl), EARLY=launch["early"], WORKERS=launch["workers"], DEEP=launch["deep"],
        SOON=launch["soon"], AHEAD=launch["ahead"], REGISTERS=launch["registers"], num_warps=pa // 16, maxnreg=launch["registers"], **pdl,
    )  # fmt: skip
    return rows
