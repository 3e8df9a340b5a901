"""Gluon, Hopper only: many rows of codes times a packed 4-bit weight (`reference.w4_linear`), warps with roles of their own.

One warp brings tiles by the copy engine; two warpgroups each own half of a tile's outputs: while one takes nibbles apart in
registers, or writes its results, the other keeps the tensor cores busy; two warps fetch what follows the product. A program
stays on its multiprocessor and goes through tiles. Tiles are 256 outputs by 128 tokens, since a byte of the weight holds
two numbers and one of the codes a single one: this shape moves the fewest bytes from the cache per product.

The integer product is exact; what follows is that of `epilogue_triton`.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from optimum_freeact.kernels.epilogue_triton import columns_of, scale_outputs
from optimum_freeact.kernels.feed_hopper import prepare, produce, send, tile_order
from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import launch_pdl
from optimum_freeact.kernels.nibbles_gluon import half_codes, high_codes, low_codes, scaled_codes
from optimum_freeact.kernels.reference import Rows, Weight


@gluon.jit
def _consume(
    given, WHICH: gl.constexpr, HALF: gl.constexpr, HAS_BIAS: gl.constexpr, RANK: gl.constexpr, HAS_BRANCH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, VALUES: gl.constexpr, GB: gl.constexpr,
):  # fmt: skip
    """One half of a tile's outputs."""
    (
        w_ring, even_ring, odd_ring, full, empty, pair, left, stats, ready, free, out_smem, y_desc, qscale_ptr,
        row_sum_ptr, bias_ptr, group_scale_ptr, m, n_blocks, m_blocks,
    ) = given  # fmt: skip
    OWN: gl.constexpr = BN // 2
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16 if VALUES else 32])
    float_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2 if VALUES else 4)
    if GB > 0:
        NG: gl.constexpr = BK // GB
        probe = gl.zeros((OWN, BK), gl.float16, left_layout).reshape([OWN, NG, GB])
        scale_layout: gl.constexpr = gl.SliceLayout(2, probe.type.layout)
        group = gl.arange(0, NG, gl.SliceLayout(0, scale_layout))
    tiles = n_blocks * m_blocks
    STEPS: gl.constexpr = HALF // BK
    out = out_smem.index(WHICH)
    count = 0
    visited = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block_n, block_m = tile_order(t, n_blocks, m_blocks, GROUP)
        first = block_m * BN + WHICH * OWN
        outs = first + gl.arange(0, OWN, gl.SliceLayout(1, float_layout))
        is_out = outs < m
        if not VALUES:
            row_sum = gl.load(row_sum_ptr + outs, mask=is_out, other=0)
        qscale = gl.load(qscale_ptr + outs, mask=is_out, other=0.0)
        if HAS_BIAS:
            bias = gl.load(bias_ptr + outs, mask=is_out, other=0.0)
        acc = gl.zeros((OWN, BM), gl.float32 if VALUES else gl.int32, acc_layout)
        if GB > 0:
            rows = first + gl.arange(0, OWN, gl.SliceLayout(1, scale_layout))
            scale_ptrs = (
                group_scale_ptr + gl.expand_dims(gl.minimum(rows, m - 1), 1) * (HALF // GB) + gl.expand_dims(group, 0)
            )
            coming = gl.load(scale_ptrs)
        for step in range(STEPS):
            slot = count % STAGES
            if GB > 0:
                scale = coming.to(gl.float16)
                coming = gl.load(scale_ptrs + gl.minimum(step + 1, STEPS - 1) * NG)
            mbarrier.wait(full.index(slot), (count // STAGES) & 1)
            w = w_ring.index(slot).slice(WHICH * OWN, OWN, 0).load(left_layout)
            if GB > 0:
                low, high = scaled_codes(w, scale, left_layout, OWN, BK, GB)
            elif VALUES:
                low, high = half_codes(w)
            else:
                low, high = low_codes(w), high_codes(w)
            acc = warpgroup_mma(low, even_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(high, odd_ring.index(slot).permute((1, 0)), acc, is_async=True)
            # registers that hold nibbles may not change before their products have ended; the other group goes on
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty.index(slot))
            count += 1

        mbarrier.wait(ready, visited & 1)
        y = gl.convert_layout(acc, float_layout).to(gl.float32)
        scale = gl.expand_dims(stats.index(0).load(gl.SliceLayout(0, float_layout)), 0)
        if VALUES:
            y *= scale
        else:  # told apart, as in `epilogue_triton.scaled`
            offset = gl.expand_dims(stats.index(1).load(gl.SliceLayout(0, float_layout)), 0)
            taken = offset * gl.expand_dims(row_sum.to(gl.float32), 1)
            y = gl.fma(y, scale, taken)
        y *= gl.expand_dims(qscale, 1)
        if HAS_BIAS:
            y += gl.expand_dims(bias, 1)
        if HAS_BRANCH:
            own = left.slice(WHICH * OWN, OWN, 0)
            if RANK > 0:
                y = warpgroup_mma(own, pair.index(0).permute((1, 0)), y, is_async=True)
            y = warpgroup_mma(own, pair.index(1).permute((1, 0)), y, is_async=True)
            y = warpgroup_mma_wait(0, [y])
        mbarrier.arrive(free)
        visited += 1
        tma.store_wait(0)  # the last results have left
        out.permute((1, 0)).store(y.to(out.dtype))
        fence_async_shared()
        send(y_desc, [block_n * BM, first], out)
    tma.store_wait(0)


@gluon.jit
def _w4_hopper(
    w_desc, codes_desc, y_desc, stats_ptr, branch_ptr, types_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr,
    columns_ptr, group_scale_ptr, n, m, n_bias,
    HALF: gl.constexpr, HAS_BIAS: gl.constexpr, RANK: gl.constexpr, MARKS: gl.constexpr, PR: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    VALUES: gl.constexpr, GB: gl.constexpr, UNIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, BN, BK], w_desc.layout)
    even_ring = gl.allocate_shared_memory(codes_desc.dtype, [STAGES, BM, BK], codes_desc.layout)
    odd_ring = gl.allocate_shared_memory(codes_desc.dtype, [STAGES, BM, BK], codes_desc.layout)
    out_smem = gl.allocate_shared_memory(y_desc.dtype, [2, BM, BN // 2], y_desc.layout)
    branch: gl.constexpr = gl.NVMMASharedLayout(2 * PR if PR < 64 else 128, 16)
    pair = gl.allocate_shared_memory(gl.bfloat16, [2, BM, PR], branch)
    left = gl.allocate_shared_memory(gl.bfloat16, [BN, PR], branch)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    stats = gl.allocate_shared_memory(gl.float32, [2, BM], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    mbarrier.init(ready, count=1)
    mbarrier.init(free, count=2)
    if PDL:
        gdc_launch_dependents()
    n_blocks, m_blocks = gl.cdiv(n, BM), gl.cdiv(m, BN)
    given = (
        w_ring, even_ring, odd_ring, full, empty, pair, left, stats, ready, free, out_smem, y_desc, qscale_ptr,
        row_sum_ptr, bias_ptr, group_scale_ptr, m, n_blocks, m_blocks,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (given, 0, HALF, HAS_BIAS, RANK, RANK + MARKS > 0, BM, BN, BK, STAGES, GROUP, VALUES, GB)),
            (_consume, (given, 1, HALF, HAS_BIAS, RANK, RANK + MARKS > 0, BM, BN, BK, STAGES, GROUP, VALUES, GB)),
            (
                produce,
                (
                    w_desc, codes_desc, w_ring, even_ring, odd_ring, full, empty, n_blocks, m_blocks,
                    HALF, BM, BN, BK, STAGES, GROUP, 2 if VALUES else 1, PDL,
                ),
            ),
            (
                prepare,
                (
                    pair, left, stats, ready, free, stats_ptr, branch_ptr, types_ptr, low_rank_ptr, low_rank_scale_ptr,
                    columns_ptr, n, m, n_bias, n_blocks, m_blocks, RANK, MARKS, PR, BM, BN, GROUP, VALUES, UNIT, PDL,
                ),
            ),
        ],
        [4, 1, 2],
        [232, 40, 40],
    )  # fmt: skip


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


_descriptions: dict[tuple, dict] = {}


def described(tensor: torch.Tensor, rows: int, columns: int, swizzle: int) -> TensorDescriptor:
    """A matrix of which the copy engine brings pieces of `rows` by `columns`."""
    key = tensor.dtype, tensor.shape, tensor.stride(), rows, columns, swizzle
    known = _descriptions.get(key)
    if known is None or tensor.data_ptr() % 16:
        layout = gl.NVMMASharedLayout(swizzle, 8 * tensor.element_size())
        made = TensorDescriptor.from_tensor(tensor, [rows, columns], layout)  # which checks all of it
        made.kind = tensor.dtype, rows, columns, swizzle  # for `launcher.kinds`
        if len(_descriptions) > 4096:  # of many numbers of rows
            _descriptions.clear()
        _descriptions[key] = {name: value for name, value in vars(made).items() if name != "base"}
        return made
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__.update(known, base=tensor)
    return made


def w4_linear(
    rows: Rows,
    types: torch.Tensor | None,
    weight: Weight,
    out_dtype: torch.dtype,
    *,
    options: dict | None = None,
) -> torch.Tensor:
    """Output `(n, m)` of rounded rows, as `w4_triton.w4_linear`; `out_dtype` has two bytes, m is divisible by 8."""
    n = len(rows.codes)
    m, half = weight.packed.shape
    y = torch.empty(n, m, dtype=out_dtype, device=rows.codes.device)
    bias, low_rank = weight.type_bias, weight.low_rank
    columns = None if types is None else columns_of(rows, weight)
    values, groups = rows.codes.dtype == torch.float16, weight.group_scale
    width = 16 if rows.branch is None else rows.branch.shape[1]
    launch = {
        "BM": 128,
        "BN": 256,
        "BK": 32 if values else 64,
        "STAGES": 4 if values or width <= 32 else 3,  # what shared memory holds beside the branch
        "GROUP": 16,
        "pdl": False,
        **(options or {}),
    }
    pdl = launch_pdl(launch.pop("pdl"))
    bm, bn, bk = launch["BM"], launch["BN"], launch["BK"]
    tiles = -(-n // bm) * -(-m // bn)
    start(
        _w4_hopper, (min(tiles, processors(y.device)),),
        (described(weight.packed, bn, bk, bk), described(rows.codes, bm, bk, bk * rows.codes.element_size()), described(y, bm, bn // 2, 128),
        rows.stats, rows.branch, types, weight.qscale, weight.row_sum, low_rank, weight.low_rank_scale, bias, columns,
        groups, n, m, 1 if bias is None else len(bias)), HALF=half, HAS_BIAS=bias is not None, RANK=0 if low_rank is None else low_rank.shape[1],
        MARKS=0 if columns is None else columns.shape[1], PR=width,
        VALUES=values, GB=0 if groups is None else half // groups.shape[1], UNIT=scale_outputs(weight), PDL=bool(pdl),
        **launch, num_warps=4, maxnreg=168, **pdl,
    )  # fmt: skip
    return y
