"""Triton: one row of values (up to four) times a packed 4-bit weight with groups, on the plain cores (`reference.w4_linear`).

All bytes of some rows of the weight are asked for at once, before the values are there. A byte becomes two float32 numbers by
one instruction each, which are multiplied and summed group by group; a thread holds the bytes of whole groups, so that a group's
scale, and what the numbers have too much, cost next to nothing.
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
from optimum_freeact.kernels.launches import gemv_launch, launch_pdl
from optimum_freeact.kernels.reference import Rows, Weight
from optimum_freeact.kernels.triton_state import INTERPRETED


@triton.jit
def _raised(w, PLAIN: tl.constexpr):
    """Low and high nibbles of bytes plus 128, in float32: a nibble in the right bits of 128 is as much more."""
    if PLAIN:
        low = (w & 0xF).to(tl.float32) + 128.0
        high = (w >> 4).to(tl.float32) + 128.0
    else:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 l, h, k;
            mov.b32 k, 0x43000000;
            and.b32 l, $8, 0x0F0F0F0F;
            shr.u32 h, $8, 4;
            and.b32 h, h, 0x0F0F0F0F;
            prmt.b32 $0, l, k, 0x7044;
            prmt.b32 $1, l, k, 0x7144;
            prmt.b32 $2, l, k, 0x7244;
            prmt.b32 $3, l, k, 0x7344;
            prmt.b32 $4, h, k, 0x7044;
            prmt.b32 $5, h, k, 0x7144;
            prmt.b32 $6, h, k, 0x7244;
            prmt.b32 $7, h, k, 0x7344; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _groups_gemv(
    values_ptr, scale_ptr, branch_ptr, types_ptr, w_ptr, qscale_ptr, group_scale_ptr, low_rank_ptr, low_rank_scale_ptr,
    bias_ptr, y_ptr, m, n_bias,
    N: tl.constexpr, HALF: tl.constexpr, GB: tl.constexpr, HAS_BIAS: tl.constexpr, KINDS: tl.constexpr,
    RANK: tl.constexpr, PR: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, UNIT: tl.constexpr,
    PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GB bytes of a row of the weight share a scale; HALF where the row does."""
    GROUPS: tl.constexpr = HALF // GB
    WIDE: tl.constexpr = BW // GB if BW > GB else 1
    given = 0
    if N == 1 and KINDS > 0:  # first of all: where the biases lie hangs on it
        given = tl.load(types_ptr)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    is_out = outs < m
    safe = tl.where(is_out, outs, 0).to(tl.int64)
    k = tl.arange(0, BW)
    g = tl.arange(0, WIDE)
    # bytes beyond the row are read as codes of zero
    w = tl.load(w_ptr + safe[:, None] * HALF + k[None, :], mask=(k < HALF)[None, :], other=0x88)
    steps = tl.full((BN, WIDE), 1.0, tl.float32)
    if GROUPS > 1:
        steps = tl.load(group_scale_ptr + safe[:, None] * GROUPS + g[None, :], mask=(g < GROUPS)[None, :], other=0)
        steps = steps.to(tl.float32)
    qscale = tl.load(qscale_ptr + outs, mask=is_out, other=0.0)
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
    if PDL:  # the weights are on their way while the values are still being made
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    low, high = _raised(w, PLAIN)
    PIECE: tl.constexpr = BW // WIDE
    for t in tl.static_range(N):
        even = tl.load(values_ptr + t * 2 * HALF + k, mask=k < HALF, other=0.0).to(tl.float32)
        odd = tl.load(values_ptr + t * 2 * HALF + HALF + k, mask=k < HALF, other=0.0).to(tl.float32)
        products = tl.sum(tl.reshape(low * even[None, :] + high * odd[None, :], (BN, WIDE, PIECE)), 2)
        raised = 136.0 * tl.sum(tl.reshape(even + odd, (WIDE, PIECE)), 1)  # a nibble is a code and eight
        y = tl.sum((products - raised[None, :]) * steps, 1)
        y *= tl.load(scale_ptr + t) * qscale
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
    """Output `(n, m)` of one to four rounded rows of values."""
    n = len(rows.codes)
    m, half = weight.packed.shape
    y = torch.empty(n, m, dtype=out_dtype, device=rows.codes.device)
    bias, low_rank, groups = weight.type_bias, weight.low_rank, weight.group_scale
    n_bias = 0 if bias is None else len(bias)
    if n_bias == 1:
        types = None
    wide = 1 << (half - 1).bit_length()
    launch = {**gemv_launch(n, wide), **(options or {})}
    pdl = launch_pdl(launch["pdl"])
    start(
        _groups_gemv, (-(-m // launch["BN"]),),
        (rows.codes, rows.stats, rows.branch, types, weight.packed, weight.qscale, groups, low_rank, weight.low_rank_scale,
        bias, y, m, n_bias), N=n, HALF=half, GB=half if groups is None else half // groups.shape[1],
        KINDS=0 if types is None else n_bias - 1, HAS_BIAS=bias is not None, RANK=0 if low_rank is None else low_rank.shape[1],
        PR=16 if rows.branch is None else rows.branch.shape[1], BN=launch["BN"], BW=wide, UNIT=scale_outputs(weight),
        PLAIN=INTERPRETED, PDL=bool(pdl),
        num_warps=launch["warps"], **pdl,
    )  # fmt: skip
    return y
