"""Triton: what the products of packed weights share: the order of tiles, the sum of parts, branch, biases and the store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.reference import SCALE_OUTPUTS, Rows, Weight, type_columns


MOST_KINDS = tl.constexpr(3)  # further types whose biases are selected; more are looked up, or columns
FEW_ROWS = tl.constexpr(64)  # up to which they are selected


@triton.jit
def tile_order(pid, n, m, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Blocks of tokens and of outputs of a program: GROUP blocks of outputs are visited for all tokens before the next ones."""
    n_blocks, m_blocks = tl.cdiv(n, BM), tl.cdiv(m, BN)
    per_group = GROUP * n_blocks
    first = (pid // per_group) * GROUP
    size = tl.minimum(m_blocks - first, GROUP)
    return (pid % per_group) // size, first + (pid % per_group) % size


@triton.jit
def arrived_last(count_ptr, SPLIT: tl.constexpr):
    """Whether this program is the last of SPLIT to have stored its part; the counter is ready for the next launch then."""
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == SPLIT - 1
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit
def scales_of(low_rank_scale_ptr, first, RANK: tl.constexpr, UNIT: tl.constexpr):
    """Where the branch's scales of the outputs from `first` on lie; UNIT outputs share them, 0 for all."""
    if UNIT > 0:
        low_rank_scale_ptr += (first // UNIT) * RANK
    return low_rank_scale_ptr


@triton.jit
def biases_of(
    bias_ptr, types_ptr, tokens, outs, n, m, HAS_BIAS: tl.constexpr, KINDS: tl.constexpr
):  # fmt: skip
    """Biases of the first type and of up to three more, and the tokens' types. None of it depends on what a kernel waits for, and
    no load on another; nothing is done with them here, which would wait for them.
    """
    is_out = outs < m
    first = outs * 0.0
    if HAS_BIAS:
        first = tl.load(bias_ptr + outs, mask=is_out, other=0.0)
    one, two, three = first, first, first
    kind = tokens * 0
    if KINDS > 0:
        kind = tl.load(types_ptr + tokens, mask=tokens < n, other=0)
        one = tl.load(bias_ptr + m + outs, mask=is_out, other=0.0)
    if KINDS > 1:
        two = tl.load(bias_ptr + 2 * m + outs, mask=is_out, other=0.0)
    if KINDS > 2:
        three = tl.load(bias_ptr + 3 * m + outs, mask=is_out, other=0.0)
    return first, one, two, three, kind


@triton.jit
def bias_of_one(bias_ptr, given, outs, m, n_bias, HAS_BIAS: tl.constexpr):
    """Biases of the only token's type `given`: as many bytes as with one type."""
    bias = outs * 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tl.minimum(given, n_bias - 1) * m + outs, mask=outs < m, other=0.0)
    return bias


@triton.jit
def chosen_bias(first, one, two, three, kind, KINDS: tl.constexpr):
    """Of [`biases_of`] those of the types `kind`; all of one shape, or broadcast to one. Types beyond the last are the last."""
    found = first
    if KINDS > 0:
        found = tl.where(kind >= 1, one, found)
    if KINDS > 1:
        found = tl.where(kind >= 2, two, found)
    if KINDS > 2:
        found = tl.where(kind >= 3, three, found)
    return found


@triton.jit
def branch_of_weight(
    low_rank_ptr, low_rank_scale_ptr, columns_ptr, outs, m, RANK: tl.constexpr, MARKS: tl.constexpr, PR: tl.constexpr
):  # fmt: skip
    """What the weight has of the branch: its codes and the columns of types beside them, `int8` (outs, PR), and their scales. One
    matrix, so that it goes through shared memory once. Without a branch the columns of types as they are (`reference.type_columns`).
    """
    is_out = (outs < m)[:, None]
    c = tl.arange(0, PR)
    in_rank = c < RANK
    mark = c - RANK
    is_mark = (mark >= 0) & (mark < MARKS)
    numbers, scales = outs[:, None], c * 1.0
    if RANK > 0:
        place = low_rank_ptr + outs[:, None] * RANK + c[None, :]
        scales = tl.load(low_rank_scale_ptr + c, mask=in_rank, other=1.0)
        if MARKS > 0:
            powers = tl.exp2(tl.load(columns_ptr + m * MARKS + mark, mask=is_mark, other=0).to(tl.float32))
            columns = columns_ptr + outs[:, None] * MARKS + mark[None, :]
            place = tl.where(in_rank[None, :], place, columns)
            scales *= powers
        numbers = tl.load(place, mask=is_out & (in_rank | is_mark)[None, :], other=0)
    elif MARKS > 0:
        numbers = tl.load(columns_ptr + outs[:, None] * PR + c[None, :], mask=is_out, other=0.0)
    return numbers, scales


@triton.jit
def branch_of_rows(
    branch_ptr, types_ptr, tokens, n, RANK: tl.constexpr, MARKS: tl.constexpr, PR: tl.constexpr
):  # fmt: skip
    """The rows' coordinates and marks, (PR, tokens); without coordinates their types (tokens), of which [`marks_of`] makes marks
    once all else has been asked for.
    """
    found = tokens
    if RANK > 0:
        c = tl.arange(0, PR)
        found = tl.load(branch_ptr + tokens[None, :] * PR + c[:, None], mask=(tokens < n)[None, :], other=0.0)
    elif MARKS > 0:
        found = tl.load(types_ptr + tokens, mask=tokens < n, other=0)
    return found


@triton.jit
def marks_of(types, n_bias, RANK: tl.constexpr, MARKS: tl.constexpr, PR: tl.constexpr):
    """Marks (PR, tokens) of rows without coordinates (`reference.marked`); else what was given."""
    found = types
    if RANK == 0 and MARKS > 0:
        kind = tl.minimum(types.to(tl.int32), n_bias - 1)
        found = tl.where(((tl.arange(0, PR) >> 1) + 1)[:, None] == kind[None, :], 1.0, 0.0).to(tl.bfloat16)
    return found


@triton.jit
def add_branch(
    y, of_weight, right, RANK: tl.constexpr, MARKS: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Y (outs, tokens) plus the low-rank branch, and how much the biases of further types differ from the first's.

    The latter are columns beside the branch's, each met by the mark that the rounding left where a token is of that type
    (`reference.marked`): what types add is in a product that is made in any case. Without a branch they are a product of their own,
    with marks made of the types ([`marks_of`]).
    """
    numbers, scales = of_weight
    if RANK > 0:
        right *= scales[:, None]
        left = numbers.to(tl.float32).to(tl.bfloat16)
        upper = right.to(tl.bfloat16)
        lower = (right - upper.to(tl.float32)).to(tl.bfloat16)
        y = tl.dot(left.to(DOT), lower.to(DOT), y)
        y = tl.dot(left.to(DOT), upper.to(DOT), y)
    elif MARKS > 0:
        y = tl.dot(numbers.to(DOT), right.to(DOT), y)
    return y


@triton.jit
def scaled(product, scale, offset, row_sum, qscale):
    """Exact integers (outs, tokens) as numbers. The sum of two products is told apart: left to itself the compiler rounds now the
    one first, now the other, and rows would depend on how many others there are.
    """
    taken = offset[None, :] * row_sum.to(tl.float32)[:, None]
    return tl.fma(product.to(tl.float32), scale[None, :], taken) * qscale[:, None]


@triton.jit
def add_bias(
    y, parts, bias_ptr, types_ptr, tokens, outs, n, m, n_bias, HAS_BIAS: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """Y (outs, tokens) plus the biases: of one type and up to three more from `parts` ([`biases_of`]), of many by a look-up."""
    if KINDS > MOST_KINDS:
        kind = tl.minimum(tl.load(types_ptr + tokens, mask=tokens < n, other=0), n_bias - 1)
        y += tl.load(bias_ptr + kind[None, :] * m + outs[:, None], mask=(outs < m)[:, None], other=0.0)
    elif HAS_BIAS:
        first, one, two, three, kind = parts
        kind = kind.to(tl.int32)[None, :]  # half as many comparisons
        y += chosen_bias(first[:, None], one[:, None], two[:, None], three[:, None], kind, KINDS)
    return y


@triton.jit
def store_outputs(y_ptr, y, tokens, outs, n, m):
    """Y (outs, tokens) to `(n, m)`."""
    place = y_ptr + tokens.to(tl.int64)[:, None] * m + outs[None, :]
    tl.store(place, tl.trans(y).to(y_ptr.dtype.element_ty), mask=(tokens < n)[:, None] & (outs < m)[None, :])


def scale_outputs(weight: Weight) -> int:
    """UNIT of [`scales_of`]."""
    scale = weight.low_rank_scale
    return 0 if scale is None or scale.dim() == 1 else SCALE_OUTPUTS


def columns_of(rows: Rows, weight: Weight) -> torch.Tensor | None:
    """The columns that meet the marks of types, or `None` where there are none.

    Raises:
        `ValueError`: if the weight has further types and the rows no room for marks.
    """
    columns = weight.type_columns
    if columns is None:
        columns = type_columns(weight.type_bias, weight.low_rank is not None)
    if weight.type_bias is None or columns is None:
        return None
    if weight.low_rank is None:
        return columns
    if rows.branch is None or rows.branch.shape[1] < weight.low_rank.shape[1] + columns.shape[1]:
        raise ValueError(f"The rows carry no marks of {len(weight.type_bias)} types (see reference.marked).")
    return columns


def further_types(rows: Rows, types: torch.Tensor | None, weight: Weight) -> tuple[int, torch.Tensor | None]:
    """How a product on tensor cores adds the biases of further types: the number of those that it selects or looks up for each
    token, or their columns.
    """
    n_bias = 0 if weight.type_bias is None else len(weight.type_bias)
    if types is None or n_bias < 2:
        return 0, None
    selected = len(rows.codes) <= FEW_ROWS.value and n_bias - 1 <= MOST_KINDS.value
    columns = None if selected else columns_of(rows, weight)
    return (n_bias - 1 if columns is None else 0), columns


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


def room_for_parts(
    split: int, n: int, m: int, launch: dict, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where SPLIT programs leave their parts of the same outputs, and the counters of those that have."""
    if split == 1:
        return None, None
    blocks = -(-m // launch["BN"])
    if n > launch["BM"] or blocks > COUNTERS:
        raise ValueError(
            f"SPLIT={split} needs all {n} tokens in one block (BM={launch['BM']}) and at most {COUNTERS} blocks of outputs, "
            f"got {blocks}."
        )
    return torch.empty(split * blocks * launch["BN"] * launch["BM"], dtype=dtype, device=device), counters(device)
