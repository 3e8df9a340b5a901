"""Triton: rows without a branch, in one launch: centre, scale, rotate and round (`reference.round_rows` with rank 0).

A branch must know the whole row before the row may be rotated; without one a row is read once and its codes are written once.
The tile of a token is multiplied by the left factor first, so that the result, as it lies in the registers, is the left
operand of the product with the right one. Both factors stay where they are while a program goes through its tokens.

Arithmetic is that of `rounding_triton`: centring and scaling in float32, a bound of the row's magnitude that brings it into
float16, both products of the rotation in float16 with float32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.grids_triton import MAGIC_BITS, grid_of, stepped
from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import launch_pdl, pass_launch
from optimum_freeact.kernels.prefetch_triton import ask_for, lines_of
from optimum_freeact.kernels.reference import HEADROOM, Rows
from optimum_freeact.kernels.rounding_triton import outputs
from optimum_freeact.kernels.tables import InputTables, padded
from optimum_freeact.kernels.triton_state import INTERPRETED


@triton.jit
def _extremes(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def _tile(pointer, place, inside, WHOLE: tl.constexpr):
    """What lies at `place`, zeros outside the tile."""
    return tl.load(pointer + place) if WHOLE else tl.load(pointer + place, mask=inside, other=0.0)


@triton.jit
def _round_tiles(
    x_ptr, types_ptr, mean_ptr, channel_ptr, reach_ptr, left_ptr, right_ptr, factor_ptr, clip_ptr, codes_ptr, stats_ptr,
    n, n_means, n_clips,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_CHANNEL: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr, LIMIT: tl.constexpr, TOO_MUCH: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, MEAN_AHEAD: tl.constexpr,
    ASK: tl.constexpr, LINES: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Whole rows, one after the other. All that concerns a row is a scalar, so that no layout has it twice."""
    D: tl.constexpr = A * B
    WHOLE: tl.constexpr = A == PA and B == PB
    i = tl.arange(0, PA)
    j = tl.arange(0, PB)
    left = tl.load(left_ptr + i[:, None] * PA + i[None, :])
    right = tl.load(right_ptr + j[:, None] * PB + j[None, :])
    factor = tl.load(factor_ptr)
    place = i[:, None] * B + j[None, :]
    inside = (i < A)[:, None] & (j < B)[None, :]
    HALF: tl.constexpr = B // 2  # the columns of the right factor are split, so those of z are
    column = i[:, None] * HALF + tl.where(j < HALF, j, j - HALF + A * HALF)[None, :]
    if HAS_CHANNEL:
        reach_channel = tl.load(reach_ptr + n_means)
    start = tl.program_id(0)
    if LINES > 0 and not PLAIN:
        if (
            start < ASK
        ):  # means may come all the way from memory: they set out while the rows' types are still on theirs
            ask_for(mean_ptr, n_means * D, LINES, 2)
            ask_for(reach_ptr, n_means, 1, 4)
            ask_for(clip_ptr, n_clips, 1, 4)
    coming_kind = 0
    if HAS_TYPES:  # there since the model's own hook ran, long before
        coming_kind = tl.load(types_ptr + start).to(tl.int32)
    if HAS_MEAN and MEAN_AHEAD:
        mean = _tile(mean_ptr + tl.minimum(coming_kind, n_means - 1) * D, place, inside, WHOLE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if AHEAD:
        coming = _tile(x_ptr + tl.cast(start, tl.int64) * D, place, inside, WHOLE)
    for row in tl.range(start, n, tl.num_programs(0), num_stages=STAGES):
        if AHEAD:
            x = coming
            coming = _tile(
                x_ptr + tl.cast(tl.minimum(row + tl.num_programs(0), n - 1), tl.int64) * D, place, inside, WHOLE
            )
        else:
            x = _tile(x_ptr + tl.cast(row, tl.int64) * D, place, inside, WHOLE)
        kind = tl.minimum(coming_kind, n_means - 1)
        clip = tl.load(clip_ptr + tl.minimum(coming_kind, n_clips - 1))
        if HAS_MEAN:
            reach = tl.load(reach_ptr + kind)
            if not MEAN_AHEAD:
                mean = _tile(mean_ptr + kind * D, place, inside, WHOLE)
        if HAS_TYPES:  # the next row's type is on its way while this one is rounded
            coming_kind = tl.load(types_ptr + tl.minimum(row + tl.num_programs(0), n - 1)).to(tl.int32)
        u = x.to(tl.float32)
        bound = tl.max(tl.abs(u))
        if HAS_CHANNEL:
            bound *= reach_channel
        if HAS_MEAN:
            u -= mean.to(tl.float32)
            bound += reach
        if HAS_CHANNEL:
            u *= _tile(channel_ptr, place, inside, WHOLE)
        undo = tl.maximum(bound, 1e-30) / LIMIT
        turned = tl.dot(left, (u * (1.0 / undo)).to(tl.float16)).to(tl.float16)
        z = tl.dot(turned, right)
        undo *= factor
        lowest, highest = z, z  # rows that pad a tile repeat its first one
        if B != PB:
            lowest = tl.where((j < B)[None, :], z, float("inf"))
            highest = tl.where((j < B)[None, :], z, float("-inf"))
        if PLAIN:
            low, high = tl.min(lowest), tl.max(highest)
        else:  # one look at all warps for both
            low, high = tl.reduce((lowest, highest), None, _extremes)
        if HAS_MEAN and MEAN_AHEAD and HAS_TYPES:
            mean = _tile(mean_ptr + tl.minimum(coming_kind, n_means - 1) * D, place, inside, WHOLE)
        # what is not finite anywhere in a row was spread over all of it by the rotation, so the extremes tell
        good = tl.abs(high - low) < float("inf")
        scale, offset = grid_of(low, high, clip, 1.0 / undo, QMIN, QMAX, SYMMETRIC)
        inverse = 1.0 / scale
        bits = stepped(z, inverse, offset * inverse, QMIN, QMAX).to(tl.int32, bitcast=True)
        codes = codes_ptr + tl.cast(row, tl.int64) * D + column
        tl.store(codes, bits.to(tl.int8), mask=inside)
        counted = bits - MAGIC_BITS if PLAIN else bits  # where sums are modulo 2^32, it is taken off at the end
        if B != PB:
            counted = tl.where((j < B)[None, :], counted, 0)
        total = tl.sum(tl.where(i < A, tl.sum(counted, 1), 0), 0) - TOO_MUCH
        if not good:
            tl.store(codes, tl.zeros_like(bits).to(tl.int8), mask=inside)
            total = 0
        nan = tl.where(good, 0.0, float("nan"))
        tl.store(stats_ptr + row, scale * undo + nan)
        tl.store(stats_ptr + n + row, offset * undo + nan)
        tl.store(stats_ptr + 2 * n + row, total.to(tl.float32))


def round_rows(
    x: torch.Tensor, types: torch.Tensor | None, tables: InputTables, *, options: dict | None = None
) -> Rows:
    """Rounded rows of `x` of shape `(n, d)`, contiguous, bfloat16 or float16; `types` `(n,)` int64; for tables of
    `one_pass`.

    `options` overrides launch settings (`launches.py`).
    """
    n, d = x.shape
    n_means, n_clips = tables.n_means, tables.n_clips
    rows = outputs(x, tables)
    if n == 0:
        return rows
    if n_clips == 1 and n_means == 1:
        types = None
    qmax = (1 << (tables.bits - 1)) - 1
    tile = padded(tables.a) * padded(tables.b)
    launch = pass_launch(n, tile, options or {})
    pdl = launch_pdl(launch["pdl"])
    lines = 0
    if launch["ask"] and types is not None and tables.mean is not None and n_means > 1:
        lines = lines_of(tables.mean.numel(), tables.mean.element_size())
    start(
        _round_tiles, (min(n, launch["programs"]),),
        (x, types, tables.mean, tables.channel_scale, tables.reach, tables.left, tables.right, tables.factor, tables.clip,
        rows.codes, rows.stats, n, n_means, n_clips),
        HAS_TYPES=types is not None, HAS_MEAN=tables.mean is not None, HAS_CHANNEL=tables.channel_scale is not None,
        A=tables.a, B=tables.b, PA=padded(tables.a),
        PB=padded(tables.b), QMIN=-qmax - 1, QMAX=qmax, SYMMETRIC=tables.symmetric, LIMIT=HEADROOM, TOO_MUCH=0 if INTERPRETED else (d * MAGIC_BITS.value + 2**31) % 2**32 - 2**31,
        STAGES=launch["stages"], AHEAD=launch["ahead"], MEAN_AHEAD=launch["mean_ahead"],
        ASK=launch["ask"], LINES=lines, PLAIN=INTERPRETED, PDL=bool(pdl), num_warps=launch["warps"],
        maxnreg=launch["registers"], **pdl,
    )  # fmt: skip
    return rows
