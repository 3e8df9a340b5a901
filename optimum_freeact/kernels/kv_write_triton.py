"""Triton: new states of the 4-bit KV cache, quantized and packed as `numerics.vector_codec` stores them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.kv_reference import CacheRows
from optimum_freeact.kernels.triton_state import triton_type


@triton.jit
def _down(x, STORE: tl.constexpr):
    """The largest number of the two-byte type that is not above `x`, as `vector_codec._round_down`."""
    rounded = x.to(STORE)
    bits = rounded.to(tl.int16, bitcast=True)
    below = (bits + tl.where(bits > 0, -1, 1).to(tl.int16)).to(STORE, bitcast=True)
    return tl.where(rounded.to(tl.float32) > x, below, rounded)


@triton.jit
def _half_even(x):
    """Nearest integer of a number in [0, 16), half to even."""
    floor = tl.floor(x)
    rest = x - floor
    up = (rest > 0.5) | ((rest == 0.5) & (floor - 2 * tl.floor(floor * 0.5) == 1.0))
    return floor + tl.where(up, 1.0, 0.0)


@triton.jit
def _write(
    x_ptr, out_ptr, grid_ptr, mean_ptr, cos_ptr, sin_ptr, start_ptr, tokens, heads, position,
    stride_b, stride_h, stride_t, out_b, out_h, out_t,
    HALF: tl.constexpr, PH: tl.constexpr, N: tl.constexpr, STORE: tl.constexpr,
    HAS_MEAN: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    t = index % tokens
    h = index // tokens % heads
    b = index // (tokens * heads)
    k = tl.arange(0, PH)
    inside = k < HALF
    base = x_ptr + b * stride_b + h * stride_h + t * stride_t
    even = tl.load(base + 2 * k, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(base + 2 * k + 1, mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        row = mean_ptr + h * 2 * HALF
        turn = tl.maximum(position + t - tl.load(start_ptr + b), 0)
        for side in tl.static_range(2):
            c = 2 * k + side
            mean = tl.load(row + c, mask=inside, other=0.0)
            if TURNS:  # channel i turns with channel N + i
                turned = inside & (c < 2 * N)
                i = tl.where(c < N, c, c - N)
                cos = tl.load(cos_ptr + turn * N + i, mask=turned, other=1.0)
                sin = tl.load(sin_ptr + turn * N + i, mask=turned, other=0.0)
                other = tl.load(row + tl.where(c < N, c + N, c - N), mask=turned, other=0.0)
                mean = mean * cos + tl.where(c < N, -other, other) * sin
            if side == 0:
                even -= mean
            else:
                odd -= mean
    low = tl.minimum(tl.min(tl.where(inside, even, float("inf")), 0), tl.min(tl.where(inside, odd, float("inf")), 0))
    high = tl.maximum(
        tl.max(tl.where(inside, even, float("-inf")), 0), tl.max(tl.where(inside, odd, float("-inf")), 0)
    )
    bad = tl.sum(tl.where(inside, even * 0.0 + odd * 0.0, 0.0), 0)  # NaN from NaN and infinity
    low_stored = _down(low + bad, STORE)
    reach = (high - low_stored.to(tl.float32)) / 15.0
    step = -_down(-(reach + bad), STORE).to(tl.float32)  # not below what is needed
    step = tl.where(step == 0.0, 1.0, step)
    from_ = low_stored.to(tl.float32)
    first = _half_even(tl.minimum(tl.maximum((even - from_) / step, 0.0), 15.0))
    second = _half_even(tl.minimum(tl.maximum((odd - from_) / step, 0.0), 15.0))
    first = tl.where(first == first, first, 8.0)
    second = tl.where(second == second, second, 8.0)
    packed = first.to(tl.uint8) | (second.to(tl.uint8) << 4)
    out = b * out_b + h * out_h + t * out_t
    tl.store(out_ptr + out + k, packed, mask=inside)
    at = (out + HALF) // 2
    tl.store(grid_ptr + at, step.to(STORE))
    tl.store(grid_ptr + at + 1, low_stored)


def write_rows(states: torch.Tensor, rows: CacheRows, start: torch.Tensor, position: int, out: torch.Tensor) -> None:
    """Encode `states` of shape `(batch, heads, tokens, head_dim)`, the first at cache position `position`, into `out`.

    Args:
        states: In the model's type; rotated already if the cache rotates.
        rows ([`CacheRows`]): How this kind of states is stored; its `data` is not read.
        start (`torch.Tensor` of shape `(batch,)`, int32, on the device): Position of each row's first real token.
        position (`int`): As said.
        out (`uint8`, shape `(batch, heads, tokens, row bytes)`): May be a part of a larger buffer.
    """
    batch, heads, tokens, size = states.shape
    if states.numel() == 0:
        return
    states = states if states.stride(-1) == 1 else states.contiguous()
    half, n = size // 2, 0 if rows.cos is None else rows.cos.shape[1]
    nothing = states
    _write[(batch * heads * tokens,)](
        states, out, out.view(rows.storage), rows.mean if rows.mean is not None else nothing,
        rows.cos if n else nothing, rows.sin if n else nothing, start, tokens, heads, position,
        *states.stride()[:3], *out.stride()[:3],
        HALF=half, PH=triton.next_power_of_2(half), N=max(n, 1), STORE=triton_type(rows.storage),
        HAS_MEAN=rows.mean is not None, TURNS=n > 0, num_warps=1,
    )  # fmt: skip
