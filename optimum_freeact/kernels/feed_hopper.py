"""Gluon, Hopper only: the warps of `w4_hopper` that bring what the others multiply: tiles, and what follows a product."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait


# Names of Triton 3.6, and those of later ones
bring = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
send = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # of the warps of a role


@gluon.jit
def tile_order(t, n_blocks, m_blocks, GROUP: gl.constexpr):
    """Blocks of tokens and outputs of tile `t`: GROUP blocks of tokens are visited for all outputs before the next ones."""
    per_group = GROUP * m_blocks
    first = (t // per_group) * GROUP
    size = gl.minimum(n_blocks - first, GROUP)
    inner = t % per_group
    return first + inner % size, inner // size


@gluon.jit
def produce(
    w_desc, codes_desc, w_ring, even_ring, odd_ring, full, empty, n_blocks, m_blocks,
    HALF: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    ITEM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of the weight, and of the even and the odd codes that meet it."""
    if PDL:
        gdc_wait()
    tiles = n_blocks * m_blocks
    STEPS: gl.constexpr = HALF // BK
    count = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block_n, block_m = tile_order(t, n_blocks, m_blocks, GROUP)
        for step in range(STEPS):
            slot = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(empty.index(slot), phase ^ 1)
            ready = full.index(slot)
            mbarrier.expect(ready, BN * BK + 2 * BM * BK * ITEM)
            at = step * BK
            bring(w_desc, [block_m * BN, at], ready, w_ring.index(slot))
            bring(codes_desc, [block_n * BM, at], ready, even_ring.index(slot))
            bring(codes_desc, [block_n * BM, HALF + at], ready, odd_ring.index(slot))
            count += 1


@gluon.jit
def _scales(low_rank_scale_ptr, columns_ptr, m, c, RANK: gl.constexpr, MARKS: gl.constexpr):
    """Of the branch's columns, those of types included, as a row."""
    found = gl.load(low_rank_scale_ptr + c, mask=c < RANK, other=1.0)
    if MARKS > 0:  # powers of two
        exponent = gl.load(columns_ptr + m * MARKS + (c - RANK), mask=(c >= RANK) & (c < RANK + MARKS), other=0)
        found *= gl.exp2(exponent.to(gl.float32))
    return gl.expand_dims(found, 0)


@gluon.jit
def prepare(
    pair, left, stats, ready, free, stats_ptr, branch_ptr, types_ptr, low_rank_ptr, low_rank_scale_ptr, columns_ptr, n, m, n_bias,
    n_blocks, m_blocks,
    RANK: gl.constexpr, MARKS: gl.constexpr, PR: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr,
    VALUES: gl.constexpr, UNIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What follows a tile's product, brought to shared memory while the product runs."""
    PART: gl.constexpr = 32 if PR <= 32 else 16  # rows at a time: what the registers of two warps hold
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 * 4 // PR, PR // 4], [2, 1], [1, 0])
    token_layout: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    HAS_BRANCH: gl.constexpr = RANK + MARKS > 0
    c = gl.arange(0, PR, gl.SliceLayout(0, rows_layout))
    part = gl.arange(0, PART, gl.SliceLayout(1, rows_layout))
    in_rank = gl.expand_dims(c < RANK, 0)
    is_mark = gl.expand_dims((c >= RANK) & (c < RANK + MARKS), 0)
    mark = gl.expand_dims(c - RANK, 0)
    if RANK > 0 and UNIT == 0:
        column_scale = _scales(low_rank_scale_ptr, columns_ptr, m, c, RANK, MARKS)
    if PDL:
        gdc_wait()
    count = 0
    for t in range(gl.program_id(0), n_blocks * m_blocks, gl.num_programs(0)):
        block_n, block_m = tile_order(t, n_blocks, m_blocks, GROUP)
        mbarrier.wait(free, (count & 1) ^ 1)
        tokens = block_n * BM + gl.arange(0, BM, token_layout)
        scale = gl.load(stats_ptr + tokens, mask=tokens < n, other=0.0)
        if VALUES:
            stats.index(0).store(scale)
        else:
            stats.index(0).store(scale * 0.0625)
            stats.index(1).store(gl.load(stats_ptr + n + tokens, mask=tokens < n, other=0.0))
        if HAS_BRANCH:
            if RANK > 0 and UNIT > 0:
                scales = low_rank_scale_ptr + (block_m * BN // UNIT) * RANK
                column_scale = _scales(scales, columns_ptr, m, c, RANK, MARKS)
            for k in gl.static_range(BM // PART):
                rows = block_n * BM + k * PART + part
                if RANK > 0:
                    right = gl.load(
                        branch_ptr + gl.expand_dims(rows * PR, 1) + gl.expand_dims(c, 0),
                        mask=gl.expand_dims(rows < n, 1), other=0.0,
                    )  # fmt: skip
                    right *= column_scale
                    upper = right.to(gl.bfloat16)
                    pair.index(0).slice(k * PART, PART, 0).store((right - upper.to(gl.float32)).to(gl.bfloat16))
                else:  # without coordinates nobody left the rows' marks (`reference.marked`)
                    kind = gl.minimum(gl.load(types_ptr + rows, mask=rows < n, other=0).to(gl.int32), n_bias - 1)
                    upper = gl.where(gl.expand_dims(kind, 1) == gl.expand_dims(c // 2 + 1, 0), 1.0, 0.0).to(
                        gl.bfloat16
                    )
                pair.index(1).slice(k * PART, PART, 0).store(upper)
            for k in gl.static_range(BN // PART):
                rows = block_m * BN + k * PART + part
                inside = gl.expand_dims(rows < m, 1)
                if RANK > 0:
                    at = low_rank_ptr + gl.expand_dims(rows * RANK, 1) + gl.expand_dims(c, 0)
                    numbers = gl.load(at, mask=inside & in_rank, other=0)
                    if MARKS > 0:  # no place has both
                        at = columns_ptr + gl.expand_dims(rows * MARKS, 1) + mark
                        numbers = numbers | gl.load(at, mask=inside & is_mark, other=0)
                else:
                    numbers = gl.load(
                        columns_ptr + gl.expand_dims(rows * PR, 1) + gl.expand_dims(c, 0), mask=inside, other=0.0
                    )
                left.slice(k * PART, PART, 0).store(numbers.to(gl.bfloat16))
        fence_async_shared()
        mbarrier.arrive(ready)
        count += 1
