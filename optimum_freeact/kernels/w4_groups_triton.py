"""Triton: rows of values times a packed 4-bit weight whose groups of columns have scales (`reference.w4_linear`).

A code times its group's byte is a whole number up to 1016, which float16 holds exactly: bytes of the weight become such
numbers in registers, as two left operands for the even and the odd columns, and meet the rows' values (float16, in units of
each row's scale) on tensor cores, with sums in float32. One float a row of the weight and one a row of values follow in the
accumulator, with biases and branch as in `w4_triton`.
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
    scales_of,
    store_outputs,
    tile_order,
)
from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import groups_launch, launch_pdl
from optimum_freeact.kernels.reference import Rows, Weight
from optimum_freeact.kernels.triton_state import DOT_TYPE, INTERPRETED


@triton.jit
def half_codes(w, PLAIN: tl.constexpr):
    """Codes in the low and high nibbles (code + 8) of bytes, as float16."""
    if PLAIN:
        low = (w & 0xF).to(tl.float16) - 8.0
        high = (w >> 4).to(tl.float16) - 8.0
    else:  # a nibble in the last bits of 1024 is 1024 and as much
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 l, h, k;
            mov.b32 k, 0x64086408;
            and.b32 l, $4, 0x0F0F0F0F;
            shr.u32 h, $4, 4;
            and.b32 h, h, 0x0F0F0F0F;
            prmt.b32 $0, l, 0x64646464, 0x4140;
            prmt.b32 $1, l, 0x64646464, 0x4342;
            prmt.b32 $2, h, 0x64646464, 0x4140;
            prmt.b32 $3, h, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, k;
            sub.f16x2 $1, $1, k;
            sub.f16x2 $2, $2, k;
            sub.f16x2 $3, $3, k; }""",
            "=r,=r,=r,=r,r",
            [w],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _times_groups(codes, scale, BN: tl.constexpr, BK: tl.constexpr, NG: tl.constexpr):
    """Codes (BN, BK) times the scales (BN, NG) of their groups."""
    return tl.reshape(tl.reshape(codes, (BN, NG, BK // NG)) * scale[:, :, None], (BN, BK))


@triton.jit
def _w4_groups(
    values_ptr, scale_ptr, branch_ptr, types_ptr, w_ptr, qscale_ptr, group_scale_ptr, low_rank_ptr, low_rank_scale_ptr,
    bias_ptr, columns_ptr, y_ptr, n, m, n_bias, partial_ptr, count_ptr,
    HALF: tl.constexpr, GB: tl.constexpr, HAS_BIAS: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr, MARKS: tl.constexpr,
    PR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, EARLY: tl.constexpr, PLAIN: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GB bytes of a row of the weight share a scale; 0 where the row does."""
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
    even_ptrs = values_ptr + safe_tokens[None, :] * (2 * HALF) + k[:, None]
    if GB > 0:
        NG: tl.constexpr = BK // GB if BK > GB else 1
        GROUPS: tl.constexpr = HALF // GB
        g = tl.arange(0, NG)
        group_ptrs = group_scale_ptr + safe_outs[:, None] * GROUPS + g[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    STEPS: tl.constexpr = (HALF + BK - 1) // BK
    PER_PART: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    scales = low_rank_scale_ptr
    if RANK > 0:
        scales = scales_of(low_rank_scale_ptr, pid_m * BN, RANK, UNIT)
    if EARLY:  # what the weight brings to the end is on its way while the rows are still being made
        qscale = tl.load(qscale_ptr + outs, mask=outs < m, other=0.0)
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
        else:  # values beyond the row are zeros, so what the weight holds there does not count
            w = tl.load(w_ptrs + at, mask=(k + at < HALF)[None, :], other=0)
            even = tl.load(even_ptrs + at, mask=(k + at < HALF)[:, None], other=0.0)
            odd = tl.load(even_ptrs + at + HALF, mask=(k + at < HALF)[:, None], other=0.0)
        low, high = half_codes(w, PLAIN)
        if GB > 0:
            if HALF % BK == 0:
                scale = tl.load(group_ptrs + at // GB).to(tl.float16)
            else:
                scale = tl.load(group_ptrs + at // GB, mask=(g + at // GB < GROUPS)[None, :], other=0).to(tl.float16)
            low = _times_groups(low, scale, BN, BK, NG)
            high = _times_groups(high, scale, BN, BK, NG)
        acc = tl.dot(low, even, acc)
        acc = tl.dot(high, odd, acc)
    if SPLIT > 1:
        here = outs[:, None] * BM + tl.arange(0, BM)[None, :]  # partial sums: (SPLIT, m_blocks * BN, BM)
        own = partial_ptr + (part * m_blocks * BN * BM + here)
        tl.store(own, acc)
        if not arrived_last(count_ptr + pid, SPLIT):
            return
    # all that is still missing is asked for at once, before any of it is looked at; last what goes through shared memory, which waits
    scale = tl.load(scale_ptr + tokens, mask=tokens < n, other=0.0)
    if RANK > 0 or not EARLY:
        right = branch_of_rows(branch_ptr, types_ptr, tokens, n, RANK, MARKS, PR)
    if not EARLY:
        qscale = tl.load(qscale_ptr + outs, mask=outs < m, other=0.0)
        biases = biases_of(bias_ptr, types_ptr, tokens, outs, n, m, HAS_BIAS, KINDS)
        of_weight = branch_of_weight(low_rank_ptr, scales, columns_ptr, outs, m, RANK, MARKS, PR)
        right = marks_of(right, n_bias, RANK, MARKS, PR)
    if SPLIT > 1:
        acc = tl.zeros((BN, BM), tl.float32)
        for other in range(SPLIT):  # in their order, so that the sum does not depend on who came last
            acc += tl.load(partial_ptr + (other * m_blocks * BN * BM + here), cache_modifier=".cg")
    y = acc * scale[None, :] * qscale[:, None]
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
    """Output `(n, m)` of rounded rows of values; `options` overrides launch settings."""
    n = len(rows.codes)
    m, half = weight.packed.shape
    y = torch.empty(n, m, dtype=out_dtype, device=rows.codes.device)
    if n == 0:
        return y
    bias, low_rank, groups = weight.type_bias, weight.low_rank, weight.group_scale
    kinds, columns = further_types(rows, types, weight)
    group_bytes = 0 if groups is None else half // groups.shape[1]
    launch = {**groups_launch(n, m, half), **(options or {})}
    blocks = -(-n // launch["BM"]) * -(-m // launch["BN"])
    split = launch["SPLIT"]
    partial, count = room_for_parts(split, n, m, launch, torch.float32, y.device)
    width = 16 if rows.branch is None else rows.branch.shape[1]
    pdl = launch_pdl(launch["pdl"])
    start(
        _w4_groups, (blocks, split),
        (rows.codes, rows.stats, rows.branch, types, weight.packed, weight.qscale, groups, low_rank, weight.low_rank_scale,
        bias, columns, y, n, m, 1 if bias is None else len(bias), partial, count), HALF=half, GB=group_bytes,
        HAS_BIAS=bias is not None, KINDS=kinds, MARKS=0 if columns is None else columns.shape[1], RANK=0 if low_rank is None else low_rank.shape[1], PR=width, BM=launch["BM"],
        BN=launch["BN"], BK=launch["BK"], GROUP=launch["GROUP"], SPLIT=split, UNIT=scale_outputs(weight), EARLY=launch["early"], PLAIN=INTERPRETED, DOT=DOT_TYPE,
        PDL=bool(pdl), num_warps=launch["warps"], num_stages=launch["stages"], maxnreg=launch["registers"], **pdl,
    )  # fmt: skip
    return y
