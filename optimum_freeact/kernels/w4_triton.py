"""Triton: rows of codes times a packed 4-bit weight, with everything that follows in the same pass (`reference.w4_linear`).

The integer product is exact. Bytes of the weight are taken apart in registers into two operands of unsigned nibbles
(code + 8; the eight is taken back by the sum of the row's codes), one for the even and one for the odd columns. The
weight is the left operand, which tensor cores read from registers, so that nothing unpacked ever goes through memory.

What follows happens in the accumulator: scales, a bias, and a product of the high-precision coordinates (bfloat16 pairs)
with the low-rank branch. Many rows: how much the biases of further types differ are columns beside the branch's, met by the
marks that the rounding left beside the coordinates (`reference.marked`), in a product that is made in any case. Few rows: each
further type is added where it is a row's. Either way every row goes through the same steps, whatever the others' types are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.launches import launch_pdl, w4_launch
from optimum_freeact.kernels.reference import Rows, Weight, type_columns
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


FEW_ROWS, FEW_KINDS = tl.constexpr(64), tl.constexpr(3)


@triton.jit
def add_branch(
    y, branch_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, columns_ptr, types_ptr, tokens, outs, n, m,
    HAS_BIAS: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr, MARKS: tl.constexpr, PR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Y (outs, tokens) plus bias, low-rank branch, and the types' biases: as columns, or by KINDS further types."""
    is_out, is_token = outs < m, tokens < n
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outs, mask=is_out, other=0.0)
        y += bias[:, None]
        if KINDS > 0:
            kind = tl.minimum(tl.load(types_ptr + tokens, mask=is_token, other=0).to(tl.int32), KINDS)
        if KINDS > FEW_KINDS:
            further = tl.load(bias_ptr + kind[None, :] * m + outs[:, None], mask=is_out[:, None], other=0.0)
            y += further - bias[:, None]
        else:
            for other in tl.static_range(1, KINDS + 1):
                change = tl.load(bias_ptr + other * m + outs, mask=is_out, other=0.0) - bias
                y += tl.where(kind[None, :] == other, change[:, None], 0.0)
    if RANK + MARKS > 0:
        c = tl.arange(0, PR)
        right = tl.load(branch_ptr + tokens[None, :] * PR + c[:, None], mask=is_token[None, :], other=0.0)
        left = tl.zeros((y.shape[0], PR), tl.float32)
        if RANK > 0:
            right *= tl.load(low_rank_scale_ptr + c, mask=c < RANK, other=1.0)[:, None]
            left = tl.load(
                low_rank_ptr + outs[:, None] * RANK + c[None, :], mask=is_out[:, None] & (c < RANK)[None, :], other=0
            ).to(tl.float32)
        if MARKS > 0:
            mark = c - RANK
            is_mark = (mark >= 0) & (mark < MARKS)
            left += tl.load(
                columns_ptr + outs[:, None] * MARKS + mark[None, :], mask=is_out[:, None] & is_mark[None, :], other=0.0
            ).to(tl.float32)
        left = left.to(tl.bfloat16)
        upper = right.to(tl.bfloat16)
        lower = (right - upper.to(tl.float32)).to(tl.bfloat16)
        y = tl.dot(left.to(DOT), lower.to(DOT), y)
        y = tl.dot(left.to(DOT), upper.to(DOT), y)
    return y


@triton.jit
def _w4_linear(
    codes_ptr, stats_ptr, branch_ptr, w_ptr, qscale_ptr, row_sum_ptr, low_rank_ptr, low_rank_scale_ptr,
    bias_ptr, columns_ptr, types_ptr, y_ptr, n, m, partial_ptr, count_ptr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr, MARKS: tl.constexpr, PR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    PLAIN: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    part = tl.program_id(1)
    n_blocks, m_blocks = tl.cdiv(n, BM), tl.cdiv(m, BN)
    per_group = GROUP * n_blocks  # GROUP blocks of outputs are visited for all tokens before the next ones
    first = (pid // per_group) * GROUP
    size = tl.minimum(m_blocks - first, GROUP)
    pid_m = first + (pid % per_group) % size
    pid_n = (pid % per_group) // size
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
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
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
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + pid, 1, sem="acq_rel")
        if arrived != SPLIT - 1:
            return
        tl.store(count_ptr + pid, 0)  # ready for the next launch
        acc = tl.zeros((BN, BM), tl.int32)
        for other in range(SPLIT):
            acc += tl.load(partial_ptr + (other * m_blocks * BN * BM + here), cache_modifier=".cg")
    is_token, is_out = tokens < n, outs < m
    scale = tl.load(stats_ptr + tokens, mask=is_token, other=0.0)
    offset = tl.load(stats_ptr + n + tokens, mask=is_token, other=0.0)
    total = tl.load(stats_ptr + 2 * n + tokens, mask=is_token, other=0.0).to(tl.int32)
    row_sum = tl.load(row_sum_ptr + outs, mask=is_out, other=0).to(tl.float32)
    y = (acc - 8 * total[None, :]).to(tl.float32) * scale[None, :] + offset[None, :] * row_sum[:, None]
    y *= tl.load(qscale_ptr + outs, mask=is_out, other=0.0)[:, None]
    y = add_branch(
        y, branch_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, columns_ptr, types_ptr, tokens, outs, n, m, HAS_BIAS, KINDS, RANK, MARKS, PR,
        DOT,
    )  # fmt: skip
    tl.store(
        y_ptr + tokens.to(tl.int64)[:, None] * m + outs[None, :],
        tl.trans(y).to(y_ptr.dtype.element_ty),
        mask=is_token[:, None] & is_out[None, :],
    )


COUNTERS = 65536  # blocks of outputs whose parts are summed; one per block of a launch
_counters_of: dict[torch.device, torch.Tensor] = {}


def counters(device: torch.device) -> torch.Tensor:
    """Zeros that each launch leaves as zeros, one buffer per device: launches that split rows run one after the other.

    To be made before a CUDA graph is captured, or it would lie in the graph's own memory ([`ops.make_ready`]).
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _counters_of:
        _counters_of[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters_of[device]


def columns_of(rows: Rows, weight: Weight) -> torch.Tensor | None:
    """The columns that meet the marks of types, or `None`.

    Raises:
        `ValueError`: if the weight has further types and the rows no room for marks.
    """
    columns = type_columns(weight.type_bias) if weight.type_columns is None else weight.type_columns
    if weight.type_bias is None or columns is None:
        return None
    rank = 0 if weight.low_rank is None else weight.low_rank.shape[1]
    if rows.branch is None or rows.branch.shape[1] < rank + columns.shape[1]:
        raise ValueError(f"The rows carry no marks of {len(weight.type_bias)} types (see reference.marked).")
    return columns


def further_types(rows: Rows, types: torch.Tensor | None, weight: Weight) -> tuple[int, torch.Tensor | None]:
    """How [`add_branch`] adds the biases of further types: their number where it looks at types, else columns."""
    n_bias = 0 if weight.type_bias is None else len(weight.type_bias)
    if types is None or n_bias < 2:
        return 0, None
    few = len(rows.codes) <= FEW_ROWS.value and n_bias - 1 <= FEW_KINDS.value
    columns = None if few else columns_of(rows, weight)
    return (n_bias - 1 if columns is None else 0), columns


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
    blocks = triton.cdiv(n, launch["BM"]) * triton.cdiv(m, launch["BN"])
    split, partial, count = launch["SPLIT"], None, None
    if split > 1:
        if n > launch["BM"]:
            raise ValueError(f"SPLIT={split} needs all {n} tokens in one block, got BM={launch['BM']}.")
        size = split * triton.cdiv(m, launch["BN"]) * launch["BN"] * launch["BM"]
        partial = torch.empty(size, dtype=torch.int32, device=y.device)
        if blocks > COUNTERS:
            raise ValueError(f"SPLIT={split} serves up to {COUNTERS} blocks of outputs, got {blocks}.")
        count = counters(y.device)
    width = 16 if rows.branch is None else rows.branch.shape[1]
    pdl = launch_pdl(launch["pdl"])
    _w4_linear[(blocks, split)](
        rows.codes, rows.stats, rows.branch, weight.packed, weight.qscale, weight.row_sum, low_rank,
        weight.low_rank_scale, bias, columns, types, y, n, m, partial, count, HALF=half, HAS_BIAS=bias is not None, KINDS=kinds, RANK=rank,
        MARKS=0 if columns is None else columns.shape[1], PR=width, BM=launch["BM"], BN=launch["BN"], BK=launch["BK"],
        GROUP=launch["GROUP"], SPLIT=split, PLAIN=INTERPRETED, DOT=DOT_TYPE, PDL=bool(pdl),
        num_warps=launch["warps"], num_stages=launch["stages"], **pdl,
    )  # fmt: skip
    return y
