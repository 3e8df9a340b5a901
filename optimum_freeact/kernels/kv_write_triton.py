"""Triton: new states of the 4-bit KV cache, centred, rotated, quantized and packed as `numerics.vector_codec` stores them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.kv_reference import CacheRows
from optimum_freeact.kernels.triton_state import triton_type


FEW = 256  # rows up to which each has a program: a step of decoding has no tile full of them
# how rows are rotated: so many by a program, a part of their channels at a time
ONE_ROW = {"ROWS": 1, "STEP": 128, "num_warps": 4, "num_stages": 1}
TILE = {"ROWS": 32, "STEP": 32, "num_warps": 8, "num_stages": 1}
PLAIN = {"ROWS": 1, "STEP": 1, "num_warps": 1}


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
def _centred(
    x_ptr, mean_ptr, cos_ptr, sin_ptr, states, means, turn, c, inside,
    N: tl.constexpr, HAS_MEAN: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Channels `c` of states that begin at `states`, less their means, `(states, channels)`."""
    x = tl.load(x_ptr + states[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_ptr + means[:, None] + c[None, :], mask=inside, other=0.0)
        if TURNS:  # channel i turns with channel N + i
            turned = inside & (c < 2 * N)[None, :]
            i = turn[:, None] * N + tl.where(c < N, c, c - N)[None, :]
            cos = tl.load(cos_ptr + i, mask=turned, other=1.0)
            sin = tl.load(sin_ptr + i, mask=turned, other=0.0)
            beside = means[:, None] + tl.where(c < N, c + N, c - N)[None, :]
            other = tl.load(mean_ptr + beside, mask=turned, other=0.0)
            mean = mean * cos + tl.where(c < N, -1.0, 1.0)[None, :] * other * sin
        x -= mean
    return x


@triton.jit
def _write(
    x_ptr, out_ptr, grid_ptr, mean_ptr, cos_ptr, sin_ptr, rotation_ptr, start_ptr, n_rows, tokens, heads, position,
    stride_b, stride_h, stride_t, out_b, out_h, out_t,
    HALF: tl.constexpr, PH: tl.constexpr, N: tl.constexpr, STORE: tl.constexpr,
    HAS_MEAN: tl.constexpr, TURNS: tl.constexpr, ROTATED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = index < n_rows
    index = tl.where(is_row, index, 0)
    t = index % tokens
    h = index // tokens % heads
    b = index // (tokens * heads)
    k = tl.arange(0, PH)
    inside = is_row[:, None] & (k < HALF)[None, :]
    states = b * stride_b + h * stride_h + t * stride_t
    means = h * 2 * HALF
    turn = tl.maximum(position + t - tl.load(start_ptr + b), 0)
    if ROTATED:  # products with a part of the channels at a time
        j = tl.arange(0, 2 * PH)
        y = tl.zeros((ROWS, 2 * PH), tl.float32)
        for first in range(0, 2 * HALF, STEP):
            c = first + tl.arange(0, STEP)
            there = is_row[:, None] & (c < 2 * HALF)[None, :]
            x = _centred(
                x_ptr, mean_ptr, cos_ptr, sin_ptr, states, means, turn, c, there, N, HAS_MEAN, TURNS
            )  # fmt: skip
            held = (c < 2 * HALF)[:, None] & (j < 2 * HALF)[None, :]
            block = tl.load(rotation_ptr + c[:, None] * 2 * HALF + j[None, :], mask=held, other=0.0)
            if ROWS == 1:
                y += tl.sum(tl.reshape(x, (STEP, 1)) * block, 0)[None, :]
            else:
                y = tl.dot(x, block, y, input_precision="tf32x3")
        even, odd = tl.split(tl.reshape(y, (ROWS, PH, 2)))
    else:
        even = _centred(
            x_ptr, mean_ptr, cos_ptr, sin_ptr, states, means, turn, 2 * k, inside, N, HAS_MEAN, TURNS
        )  # fmt: skip
        odd = _centred(
            x_ptr, mean_ptr, cos_ptr, sin_ptr, states, means, turn, 2 * k + 1, inside, N, HAS_MEAN, TURNS
        )  # fmt: skip
    least, most = tl.where(inside, even, float("inf")), tl.where(inside, even, float("-inf"))
    low = tl.minimum(tl.min(least, 1), tl.min(tl.where(inside, odd, float("inf")), 1))
    high = tl.maximum(tl.max(most, 1), tl.max(tl.where(inside, odd, float("-inf")), 1))
    bad = tl.sum(tl.where(inside, even * 0.0 + odd * 0.0, 0.0), 1)  # NaN from NaN and infinity
    low_stored = _down(low + bad, STORE)
    from_ = low_stored.to(tl.float32)
    reach = (high - from_) / 15.0
    step = -_down(-(reach + bad), STORE).to(tl.float32)  # not below what is needed
    step = tl.where(step == 0.0, 1.0, step)
    first_code = _half_even(tl.minimum(tl.maximum((even - from_[:, None]) / step[:, None], 0.0), 15.0))
    second_code = _half_even(tl.minimum(tl.maximum((odd - from_[:, None]) / step[:, None], 0.0), 15.0))
    first_code = tl.where(first_code == first_code, first_code, 8.0)
    second_code = tl.where(second_code == second_code, second_code, 8.0)
    packed = first_code.to(tl.uint8) | (second_code.to(tl.uint8) << 4)
    out = b * out_b + h * out_h + t * out_t
    tl.store(out_ptr + out[:, None] + k[None, :], packed, mask=inside)
    at = (out + HALF) // 2
    tl.store(grid_ptr + at, step.to(STORE), mask=is_row)
    tl.store(grid_ptr + at + 1, low_stored, mask=is_row)


def write_rows(states: torch.Tensor, rows: CacheRows, start: torch.Tensor, position: int, out: torch.Tensor) -> None:
    """Encode `states` of shape `(batch, heads, tokens, head_dim)`, the first at cache position `position`, into `out`.

    Args:
        states: In the model's type, as they come.
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
    nothing, is_rotated = states, rows.rotation is not None
    n_rows = batch * heads * tokens
    launch = PLAIN if not is_rotated else ONE_ROW if n_rows <= FEW else TILE
    _write[(triton.cdiv(n_rows, launch["ROWS"]),)](
        states, out, out.view(rows.storage), rows.mean if rows.mean is not None else nothing,
        rows.cos if n else nothing, rows.sin if n else nothing, rows.rotation if is_rotated else nothing, start,
        n_rows, tokens, heads, position, *states.stride()[:3], *out.stride()[:3],
        HALF=half, PH=max(triton.next_power_of_2(half), 16 if is_rotated else 1), N=max(n, 1),
        STORE=triton_type(rows.storage), HAS_MEAN=rows.mean is not None, TURNS=n > 0, ROTATED=is_rotated, **launch,
    )  # fmt: skip
