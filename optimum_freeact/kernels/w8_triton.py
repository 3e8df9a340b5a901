"""Triton: few rows times a weight of one signed byte a number, with a scale a row of the weight: the output head.

Bytes are exact in bfloat16 and float16, so they become the left operand of a product on tensor cores in registers, whose sums
are float32; the kernel is as fast as memory brings the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.launches import w8_launch
from optimum_freeact.kernels.triton_state import INTERPRETED


MOST_ROWS = 64


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


def w8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, options: dict | None = None
) -> torch.Tensor:
    """Output `(n, m)` of rows `(n, d)`, contiguous, for an `int8` weight `(m, d)` with scales `(m,)`; `n` at most MOST_ROWS."""
    n, d = x.shape
    m = len(weight)
    y = torch.empty(n, m, dtype=x.dtype, device=x.device)
    launch = {**w8_launch(n), **(options or {})}
    _w8_linear[(triton.cdiv(m, launch["BN"]),)](
        x, weight, scale, y, n, m, D=d, BM=launch["BM"], BN=launch["BN"], BK=launch["BK"], PLAIN=INTERPRETED,
        num_warps=launch["warps"], num_stages=launch["stages"],
    )  # fmt: skip
    return y
