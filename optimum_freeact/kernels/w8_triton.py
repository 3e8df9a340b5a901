"""Triton: few rows times a weight of one signed byte a number, with a scale a row of the weight: the output head.

Bytes are exact in bfloat16 and float16, so they become the left operand of a product on tensor cores in registers, whose sums
are float32. One row is multiplied on plain cores instead, in float32, with all bytes of some rows of the weight asked for at
once: no step of a loop waits for another, and memory brings the weight faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import launch_pdl, w8_launch, w8_row_launch
from optimum_freeact.kernels.triton_state import INTERPRETED


MOST_ROWS = 64
MOST_WIDTH = 32768  # of one row, which a program holds


@triton.jit
def _w8_linear(
    x_ptr, w_ptr, scale_ptr, y_ptr, n, m,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    tokens = tl.arange(0, BM)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    w_ptrs = w_ptr + tl.where(outs < m, outs, 0).to(tl.int64)[:, None] * D + k[None, :]
    x_ptrs = x_ptr + tl.where(tokens < n, tokens, 0)[None, :] * D + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for at in range(0, D, BK):
        if D % BK == 0:
            w, x = tl.load(w_ptrs + at), tl.load(x_ptrs + at)
        else:
            w = tl.load(w_ptrs + at, mask=(k + at < D)[None, :], other=0)
            x = tl.load(x_ptrs + at, mask=(k + at < D)[:, None], other=0.0)
        if PLAIN:
            acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
        else:
            acc = tl.dot(w.to(x.dtype), x, acc)
    y = acc * tl.load(scale_ptr + outs, mask=outs < m, other=0.0).to(tl.float32)[:, None]
    place = y_ptr + tokens.to(tl.int64)[:, None] * m + outs[None, :]
    tl.store(place, tl.trans(y).to(y_ptr.dtype.element_ty), mask=(tokens < n)[:, None] & (outs < m)[None, :])


@triton.jit
def _plain_byte(w):
    """The last byte of words, signed, in float32: without its sign it is the last bits of 2^23, and 128 of it were the sign."""
    return ((w & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _w8_row(
    x_ptr, w_ptr, scale_ptr, y_ptr, m,
    WORDS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    is_out = outs < m
    k = tl.arange(0, BW)
    at = tl.where(is_out, outs, 0).to(tl.int64)[:, None] * WORDS + k[None, :]
    w = tl.load(w_ptr + at, mask=(k < WORDS)[None, :], other=0, eviction_policy="evict_first")
    scale = tl.load(scale_ptr + outs, mask=is_out, other=0.0).to(tl.float32)
    if PDL:  # the weights are on their way while the row is still being made
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + tl.arange(0, 4 * BW), mask=tl.arange(0, 4 * BW) < 4 * WORDS, other=0.0).to(tl.float32)
    evens, odds = tl.split(tl.reshape(x, (BW, 2, 2)))  # in one piece, then apart: columns of a word lie side by side
    x_0, x_2 = tl.split(evens)
    x_1, x_3 = tl.split(odds)
    acc = _plain_byte(w) * x_0[None, :]
    acc += _plain_byte(w >> 8) * x_1[None, :]
    acc += _plain_byte(w >> 16) * x_2[None, :]
    acc += _plain_byte(w >> 24) * x_3[None, :]
    tl.store(y_ptr + outs, (tl.sum(acc, 1) * scale).to(y_ptr.dtype.element_ty), mask=is_out)


def _one_row(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, options: dict) -> torch.Tensor:
    """[`w8_linear`] of one row whose length is divisible by 16."""
    m, d = weight.shape
    y = torch.empty(1, m, dtype=x.dtype, device=x.device)
    wide = triton.next_power_of_2(d // 4)
    launch = {**w8_row_launch(wide), **options}
    pdl = launch_pdl(launch["pdl"])
    start(
        _w8_row, (triton.cdiv(m, launch["BN"]),),
        (x, weight.view(torch.int32), scale, y, m), WORDS=d // 4, BN=launch["BN"], BW=wide, PDL=bool(pdl),
        num_warps=launch["warps"], **pdl,
    )  # fmt: skip
    return y


def several_rows(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, options: dict) -> torch.Tensor:
    """[`w8_linear`] of up to MOST_ROWS rows."""
    n, d = x.shape
    m = len(weight)
    y = torch.empty(n, m, dtype=x.dtype, device=x.device)
    launch = {**w8_launch(n), **options}
    start(
        _w8_linear, (triton.cdiv(m, launch["BN"]),),
        (x, weight, scale, y, n, m), D=d, BM=launch["BM"], BN=launch["BN"], BK=launch["BK"], PLAIN=INTERPRETED,
        num_warps=launch["warps"], num_stages=launch["stages"],
    )  # fmt: skip
    return y


def w8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, options: dict | None = None
) -> torch.Tensor:
    """Output `(n, m)` of rows `(n, d)`, contiguous, for an `int8` weight `(m, d)` with scales `(m,)`; `n` at most MOST_ROWS."""
    n, d = x.shape
    one = n == 1 and d % 16 == 0 and d <= MOST_WIDTH and weight.storage_offset() % 16 == 0
    return (_one_row if one else several_rows)(x, weight, scale, options or {})
