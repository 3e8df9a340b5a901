"""Triton: what the products of packed weights share: the order of tiles, the sum of parts, branch, biases and the store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.reference import SCALE_OUTPUTS, Weight


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
def add_branch(
    y, branch_ptr, types_ptr, low_rank_ptr, low_rank_scale_ptr, bias_ptr, tokens, outs, n, m, n_bias,
    HAS_TYPES: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Y (outs, tokens) plus the low-rank branch and the biases of the types.

    How much the biases of further types differ from the first's are columns beside the branch's, each met by a one where
    the token is of that type: what types add is in a product that is made in any case.
    """
    is_out, is_token = outs < m, tokens < n
    TYPED: tl.constexpr = HAS_TYPES and HAS_BIAS
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outs, mask=is_out, other=0.0)
        y += bias[:, None]
    if RANK > 0 or TYPED:
        c = tl.arange(0, PR)
        left = tl.zeros((y.shape[0], PR), tl.float32)
        right = tl.zeros((PR, y.shape[1]), tl.float32)
        if RANK > 0:
            in_rank = c < RANK
            left = tl.load(
                low_rank_ptr + outs[:, None] * RANK + c[None, :], mask=is_out[:, None] & in_rank[None, :], other=0
            ).to(tl.float32)
            right = tl.load(
                branch_ptr + tokens[None, :] * PR + c[:, None], mask=is_token[None, :] & in_rank[:, None], other=0.0
            ) * tl.load(low_rank_scale_ptr + c, mask=in_rank, other=0.0)[:, None]  # fmt: skip
        upper = right.to(tl.bfloat16)
        lower = (right - upper.to(tl.float32)).to(tl.bfloat16)
        left_upper, left_lower = left.to(tl.bfloat16), left.to(tl.bfloat16)
        if TYPED:
            other = c - RANK + 1
            typed = (c >= RANK) & (other < n_bias)
            kind = tl.minimum(tl.load(types_ptr + tokens, mask=is_token, other=0), n_bias - 1)
            is_kind = (kind[None, :] == other[:, None]) & typed[:, None]
            upper, lower = tl.where(is_kind, 1.0, upper).to(tl.bfloat16), tl.where(is_kind, 1.0, lower).to(tl.bfloat16)
            change = tl.load(
                bias_ptr + other[None, :] * m + outs[:, None], mask=is_out[:, None] & typed[None, :], other=0.0
            )
            change = tl.where(typed[None, :], change - bias[:, None], 0.0)
            left_upper = tl.where(typed[None, :], change, left).to(tl.bfloat16)
            left_lower = tl.where(typed[None, :], change - left_upper.to(tl.float32), left).to(tl.bfloat16)
        y = tl.dot(left_lower.to(DOT), lower.to(DOT), y)
        y = tl.dot(left_upper.to(DOT), upper.to(DOT), y)
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
    blocks = triton.cdiv(m, launch["BN"])
    if n > launch["BM"] or blocks > COUNTERS:
        raise ValueError(
            f"SPLIT={split} needs all {n} tokens in one block (BM={launch['BM']}) and at most {COUNTERS} blocks of outputs, "
            f"got {blocks}."
        )
    return torch.empty(split * blocks * launch["BN"] * launch["BM"], dtype=dtype, device=device), counters(device)
