"""Triton: queries rotated as the rows of the KV cache are, and attention's shares joined and turned back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


ROTATED_AT_ONCE = 32  # rows or columns of a rotation that a program holds: it is read a part at a time


@triton.jit
def join_shares(
    partial_ptr, norm_ptr, exact_ptr, mean_ptr, rotation_ptr, y_ptr, parts, heads,
    QUERIES: tl.constexpr, SIZE: tl.constexpr, PS: tl.constexpr, SINK: tl.constexpr, SINKS: tl.constexpr,
    V_MEAN: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One query's output from the running softmax of each share of the tokens.

    A share's numbers in `norm_ptr`: its largest score, what its rows weigh, and what each token of the sink weighs in it.
    """
    row = tl.program_id(0).to(tl.int64)
    bh = row // QUERIES
    query = row % QUERIES
    k = tl.arange(0, PS)
    s = tl.arange(0, SINKS)
    highest = float("-inf")
    for part in range(0, parts):
        at = (bh * parts + part) * QUERIES + query
        highest = tl.maximum(highest, tl.load(norm_ptr + (2 + SINK) * at))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    acc = tl.zeros((PS,), tl.float32)
    rows = 0.0
    sinks = tl.zeros((SINKS,), tl.float32)
    for part in range(0, parts):
        at = (bh * parts + part) * QUERIES + query
        weight = tl.exp(tl.load(norm_ptr + (2 + SINK) * at) - safe)
        rows += weight * tl.load(norm_ptr + (2 + SINK) * at + 1)
        sinks += weight * tl.load(norm_ptr + (2 + SINK) * at + 2 + s, mask=s < SINK, other=0.0)
        acc += weight * tl.load(partial_ptr + at * SIZE + k, mask=k < SIZE, other=0.0)
    norm = rows + tl.sum(sinks, 0)
    for first in range(0, PS if ROTATED else 1, STEP):
        # a part of the channels, or all
        c = first + tl.arange(0, STEP if ROTATED else PS)
        if ROTATED:
            inside = (c < SIZE)[:, None] & (k < SIZE)[None, :]
            block = tl.load(rotation_ptr + c[:, None] * SIZE + k[None, :], mask=inside, other=0.0)
            y = tl.sum(block * acc[None, :], 1)
        else:
            y = acc
        if V_MEAN:
            y += rows * tl.load(mean_ptr + bh % heads * SIZE + c, mask=c < SIZE, other=0.0)
        if SINK > 0:
            there = (s < SINK)[:, None] & (c < SIZE)[None, :]
            exact = tl.load(exact_ptr + (bh * SINK + s)[:, None] * SIZE + c[None, :], mask=there, other=0.0)
            y += tl.sum(sinks[:, None] * exact.to(tl.float32), 0)
        y = y / norm
        tl.store(y_ptr + row * SIZE + c, y.to(y_ptr.dtype.element_ty), mask=c < SIZE)


@triton.jit
def _rotate(x_ptr, rotation_ptr, y_ptr, SIZE: tl.constexpr, PS: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, PS)
    x = tl.load(x_ptr + row * SIZE + k, mask=k < SIZE, other=0.0).to(tl.float32)
    for first in range(0, PS, STEP):
        c = first + tl.arange(0, STEP)
        inside = (k < SIZE)[:, None] & (c < SIZE)[None, :]
        block = tl.load(rotation_ptr + k[:, None] * SIZE + c[None, :], mask=inside, other=0.0)
        y = tl.sum(block * x[:, None], 0)
        tl.store(y_ptr + row * SIZE + c, y.to(y_ptr.dtype.element_ty), mask=c < SIZE)


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Contiguous `x @ rotation` in the type of `x`, summed in float32: one launch for the few rows of a step."""
    size, y = x.shape[-1], torch.empty_like(x)
    _rotate[(x.numel() // size,)](
        x, rotation, y, SIZE=size, PS=triton.next_power_of_2(size), STEP=ROTATED_AT_ONCE, num_warps=4
    )
    return y
