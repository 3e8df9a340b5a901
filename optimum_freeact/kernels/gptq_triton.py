"""Triton: the column loops of GPTQ and of its coordinate descent, a block of columns a launch.

Each program holds some outputs and walks through the block's columns; what an earlier column's error does to a later one
is one dot product with the errors so far, kept in registers. In plain torch every column takes four launches, and a model
has a hundred thousand of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


BLOCK = 64  # columns a launch
OUTPUTS = 16  # a program


@triton.jit
def _round_half_even(x):
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: |x| < 2^22


@triton.jit
def _columns(
    work_ptr, steps_ptr, factor_ptr, codes_ptr, moved_ptr, start, width, m, n,
    QMIN: tl.constexpr, QMAX: tl.constexpr, DESCEND: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Codes of columns `start` to `start + width`.

    GPTQ: `work` holds what is to be rounded, row i of `factor` what each column's error does to column i, `moved` becomes
    the errors. Descent: `work` holds the gradient, `factor` the moments, `moved` becomes the changes of the values.
    """
    outs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_out = outs < m
    r = tl.arange(0, BLOCK)
    moved = tl.zeros((BLOCK, OUTPUTS), tl.float32)
    for i in range(width):
        at = (start + i).to(tl.int64) * m + outs
        row = tl.load(factor_ptr + (start + i).to(tl.int64) * n + start + r, mask=r < width, other=0.0)
        own = tl.load(factor_ptr + (start + i).to(tl.int64) * (n + 1))
        value = tl.load(work_ptr + at, mask=is_out, other=0.0) - tl.sum(row[:, None] * moved, 0)
        step = tl.load(steps_ptr + at, mask=is_out, other=1.0)
        if DESCEND:
            code = tl.load(codes_ptr + at, mask=is_out, other=0.0)
            wanted = (code * step + value / own) / step
        else:
            code = step * 0.0
            wanted = value / step
        wanted = tl.minimum(tl.maximum(wanted, QMIN * 1.0), QMAX * 1.0)  # before rounding: it knows small numbers only
        new = _round_half_even(wanted)
        if DESCEND:
            change = new * step - code * step
        else:
            change = (value - new * step) / own
        tl.store(codes_ptr + at, new, mask=is_out)
        moved = tl.where(r[:, None] == i, change[None, :], moved)
    inside = (r[:, None] < width) & is_out[None, :]
    tl.store(moved_ptr + r[:, None].to(tl.int64) * m + outs[None, :], moved, mask=inside)


def _launch(work, steps, factor, codes, moved, start: int, stop: int, limits: tuple[int, int], descend: bool) -> None:
    n, m = work.shape
    _columns[(triton.cdiv(m, OUTPUTS),)](
        work, steps, factor, codes, moved, start, stop - start, m, n,
        QMIN=limits[0], QMAX=limits[1], DESCEND=descend, BLOCK=BLOCK, OUTPUTS=OUTPUTS, num_warps=2,
    )  # fmt: skip


def round_columns(
    work: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor, limits: tuple[int, int]
) -> torch.Tensor:
    """Codes of GPTQ, as `rounding.gptq._round_columns`; `work` `(in, out)` is used up."""
    codes, moved = torch.empty_like(work), work.new_zeros(BLOCK, work.shape[1])
    lower = factor.mT.contiguous()
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        _launch(work, steps, lower, codes, moved, start, stop, limits, False)
        work[stop:].addmm_(lower[stop:, start:stop], moved[: stop - start], alpha=-1)
    return codes


def descend(
    codes: torch.Tensor, original: torch.Tensor, steps: torch.Tensor, moments: torch.Tensor, limits: tuple[int, int]
) -> None:
    """One pass of coordinate descent, as `rounding.gptq._descend`; `codes` `(in, out)` in place."""
    gradient, moved = moments @ (original - codes * steps), codes.new_zeros(BLOCK, codes.shape[1])
    for start in range(0, len(codes), BLOCK):
        stop = min(start + BLOCK, len(codes))
        _launch(gradient, steps, moments, codes, moved, start, stop, limits, True)
        gradient[stop:].addmm_(moments[stop:, start:stop], moved[: stop - start], alpha=-1)
