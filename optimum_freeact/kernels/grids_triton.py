"""Triton: the left factor of the rotation, the grids, and the rounding itself (the last step of `rounding_triton`).

`GROUP` says what leaves: 0 codes with one grid a row, for products over integers; else values on their grids in float16, in
units of the row's own scale, for products of grouped weights: with a grid for every GROUP columns (the whole row where it
is the row's length). Columns of the right factor are ordered so that a group is a run of a tile's columns
(`tables.column_order`). Where a row of a tile holds no whole number of groups, the tile leaves as it is and `_round_flat` rounds
it in a launch of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grid_of(low, high, clip, unit, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale and offset of the grid between two extremes; `unit` is the scale of what has no extent."""
    if SYMMETRIC:
        scale = tl.maximum(tl.abs(low), tl.abs(high)) * clip / (QMAX + 0.5)
        scale = tl.where(scale > 0, scale, unit)
        offset = scale * 0.0
    else:
        middle = high / 2 + low / 2
        half = (high / 2 - low / 2) * clip
        scale = half / ((QMAX - QMIN) / 2)
        offset = middle - half - scale * QMIN
        scale = tl.where(half > 0, scale, unit)
        offset = tl.where(half > 0, offset, middle)
    return scale, offset


# rounding half to even: a number added to 1.5 * 2^23 has its integer part in its last bits
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def stepped(z, inverse, shift, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Codes of `z`, plus MAGIC."""
    return tl.minimum(tl.maximum(z * inverse - shift, QMIN * 1.0), QMAX * 1.0) + MAGIC


@triton.jit
def store_codes(
    z, rows, alive, clip, undo, codes_ptr, stats_ptr, n, i, j,
    A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Grid, codes and their sum of some rows, whose values are `undo * z`, z of shape (PA, rows, PB).

    What is not finite anywhere in a row was spread over all of it by the rotation, so the extremes tell.
    """
    is_column = (j < B)[None, None, :]
    if B == PB:  # rows that pad a tile repeat its first one
        low, high = tl.min(z, 2), tl.max(z, 2)
    else:
        low = tl.min(tl.where(is_column, z, float("inf")), 2)
        high = tl.max(tl.where(is_column, z, float("-inf")), 2)
    low, high = tl.min(low, 0), tl.max(high, 0)
    good = tl.abs(high - low) < float("inf")
    scale, offset = grid_of(low, high, clip, 1.0 / undo, QMIN, QMAX, SYMMETRIC)
    inverse = 1.0 / scale
    shift = offset * inverse
    bits = stepped(z, inverse[None, :, None], shift[None, :, None], QMIN, QMAX).to(tl.int32, bitcast=True)
    HALF: tl.constexpr = B // 2  # the columns of the right factor are split, so those of z are
    column = i[:, None] * HALF + tl.where(j < HALF, j, j - HALF + A * HALF)[None, :]
    place = codes_ptr + (rows.to(tl.int64) * (A * B))[None, :, None] + column[:, None, :]
    inside = (i < A)[:, None, None] & is_column & alive[None, :, None]
    tl.store(place, bits.to(tl.int8), mask=inside)
    counted = bits - MAGIC_BITS
    if A != PA or B != PB:
        counted = tl.where((i < A)[:, None, None] & is_column, counted, 0)
    total = tl.sum(tl.sum(counted, 2), 0)
    if tl.min(good.to(tl.int32), 0) == 0:
        tl.store(place, tl.zeros_like(bits).to(tl.int8), mask=inside & (good == 0)[None, :, None])
        total = tl.where(good, total, 0)
    nan = tl.where(good, 0.0, float("nan"))
    tl.store(stats_ptr + rows, scale * undo + nan, mask=alive)
    tl.store(stats_ptr + n + rows, offset * undo + nan, mask=alive)
    tl.store(stats_ptr + 2 * n + rows, total.to(tl.float32), mask=alive)


@triton.jit
def store_values(
    z, rows, alive, clip, undo, values_ptr, stats_ptr, i, j,
    A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, TOKENS: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As [`store_codes`], but the values on their grids, in units of the scale `undo`."""
    if GROUP == A * B:
        low = tl.min(tl.min(tl.where((j < B)[None, None, :], z, float("inf")), 2), 0)
        high = tl.max(tl.max(tl.where((j < B)[None, None, :], z, float("-inf")), 2), 0)
        good = tl.abs(high - low) < float("inf")
        scale, offset = grid_of(low, high, clip, 1.0, QMIN, QMAX, SYMMETRIC)
        inverse = 1.0 / scale
        steps = stepped(z, inverse[None, :, None], (offset * inverse)[None, :, None], QMIN, QMAX) - MAGIC
        value = steps * scale[None, :, None] + offset[None, :, None]
        value = tl.where(good[None, :, None], value, float("nan"))
    else:
        groups = tl.reshape(z, (PA, TOKENS, PB // GROUP, GROUP))
        low, high = tl.min(groups, 3), tl.max(groups, 3)
        good = tl.abs(high - low) < float("inf")
        scale, offset = grid_of(low, high, clip[None, :, None], 1.0, QMIN, QMAX, SYMMETRIC)
        inverse = 1.0 / scale
        shift = offset * inverse
        steps = stepped(groups, inverse[:, :, :, None], shift[:, :, :, None], QMIN, QMAX) - MAGIC
        value = steps * scale[:, :, :, None] + offset[:, :, :, None]
        value = tl.where(good[:, :, :, None], value, float("nan"))
    # runs of a tile's columns have their even columns first: taken apart, each half lies as it does in memory
    RUN: tl.constexpr = B & -B if GROUP == A * B else GROUP
    halves = tl.permute(tl.reshape(value.to(tl.float16), (PA, TOKENS, PB // RUN, 2, RUN // 2)), (0, 1, 2, 4, 3))
    even, odd = tl.split(halves)
    h = tl.arange(0, PB // 2)
    place = (
        values_ptr + (rows.to(tl.int64) * (A * B))[None, :, None] + (i[:, None] * (B // 2) + h[None, :])[:, None, :]
    )
    inside = (i < A)[:, None, None] & (h < B // 2)[None, None, :] & alive[None, :, None]
    tl.store(place, tl.reshape(even, (PA, TOKENS, PB // 2)), mask=inside)
    tl.store(place + A * B // 2, tl.reshape(odd, (PA, TOKENS, PB // 2)), mask=inside)
    tl.store(stats_ptr + rows, undo, mask=alive)


@triton.jit
def store_tile(
    z, rows, alive, clip, undo, out_ptr, stats_ptr, n, i, j,
    A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, TOKENS: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Whatever leaves of rotated rows, by GROUP."""
    if GROUP == 0:
        store_codes(z, rows, alive, clip, undo, out_ptr, stats_ptr, n, i, j, A, B, PA, PB, QMIN, QMAX, SYMMETRIC)
    elif GROUP == A * B or (B % GROUP == 0 and (GROUP & (GROUP - 1)) == 0):
        store_values(
            z, rows, alive, clip, undo, out_ptr, stats_ptr, i, j, A, B, PA, PB, TOKENS, QMIN, QMAX, SYMMETRIC, GROUP
        )
    else:
        place = out_ptr + (rows.to(tl.int64) * (A * B))[None, :, None] + (i[:, None] * B + j[None, :])[:, None, :]
        tl.store(place, z, mask=(i < A)[:, None, None] & (j < B)[None, None, :] & alive[None, :, None])
        tl.store(stats_ptr + rows, undo, mask=alive)


@triton.jit
def finish(
    turned_ptr, undo_ptr, left_ptr, factor_ptr, out_ptr, stats_ptr, n,
    A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr,
    TOKENS: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Whole tiles, of TOKENS rows at a time: times the left factor, rounded. Behind `undo` lie the rows' clips."""
    i = tl.arange(0, PA)
    j = tl.arange(0, PB)
    c = tl.arange(0, TOKENS * PB)
    left = tl.load(left_ptr + i[:, None] * PA + i[None, :])
    factor = tl.load(factor_ptr)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for first in range(tl.program_id(0) * TOKENS, n, tl.num_programs(0) * TOKENS):
        token = tl.minimum(first + c // PB, n - 1).to(tl.int64)
        tile = turned_ptr + i[:, None] * B + (token * (A * B) + c % PB)[None, :]
        if A == PA and B == PB:
            turned = tl.load(tile)
        else:
            turned = tl.load(tile, mask=(i < A)[:, None] & (c % PB < B)[None, :], other=0.0)
        z = tl.reshape(tl.dot(left, turned), (PA, TOKENS, PB))
        rows = first + tl.arange(0, TOKENS)
        safe = tl.minimum(rows, n - 1)
        undo = tl.load(undo_ptr + safe) * factor
        clip = tl.load(undo_ptr + n + safe)
        store_tile(
            z, rows, rows < n, clip, undo, out_ptr, stats_ptr, n, i, j, A, B, PA, PB, TOKENS, QMIN, QMAX, SYMMETRIC,
            GROUP,
        )  # fmt: skip


@triton.jit
def round_flat(
    z_ptr, clips_ptr, values_ptr, total,
    D: tl.constexpr, GROUP: tl.constexpr, PG: tl.constexpr, COUNT: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """COUNT groups of rotated rows in their natural order: onto their grids."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    group = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    t = tl.arange(0, PG)
    alive = group < total
    inside = alive[:, None] & (t < GROUP)[None, :]
    safe = tl.where(alive, group, 0)
    row = safe // (D // GROUP)
    z = tl.load(z_ptr + safe[:, None] * GROUP + t[None, :], mask=inside, other=0.0)
    low = tl.min(tl.where(inside, z, float("inf")), 1)
    high = tl.max(tl.where(inside, z, float("-inf")), 1)
    good = tl.abs(high - low) < float("inf")
    clip = tl.load(clips_ptr + row)
    scale, offset = grid_of(low, high, clip, 1.0, QMIN, QMAX, SYMMETRIC)
    inverse = 1.0 / scale
    value = stepped(z, inverse[:, None], (offset * inverse)[:, None], QMIN, QMAX) - MAGIC
    value = tl.where(good[:, None], value * scale[:, None] + offset[:, None], float("nan"))
    column = (safe % (D // GROUP))[:, None] * GROUP + t[None, :]
    place = values_ptr + row[:, None] * D + (column % 2) * (D // 2) + column // 2
    tl.store(place, value.to(tl.float16), mask=inside)
