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

from optimum_freeact.kernels.grids_triton import store_codes
from optimum_freeact.kernels.launches import launch_pdl, pass_launch
from optimum_freeact.kernels.reference import HEADROOM, Rows
from optimum_freeact.kernels.tables import InputTables, padded


@triton.jit
def _round_tiles(
    x_ptr, types_ptr, mean_ptr, channel_ptr, reach_ptr, left_ptr, right_ptr, factor_ptr, clip_ptr, codes_ptr, stats_ptr,
    branch_ptr, n, n_means, n_clips,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_CHANNEL: tl.constexpr, MARKED: tl.constexpr, PR: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, TOKENS: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, LIMIT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Whole tiles, of TOKENS rows at a time."""
    i = tl.arange(0, PA)
    j = tl.arange(0, PB)
    left = tl.load(left_ptr + i[:, None] * PA + i[None, :])
    right = tl.load(right_ptr + j[:, None] * PB + j[None, :])
    factor = tl.load(factor_ptr)
    place = i[:, None, None] * B + j[None, None, :]
    WHOLE: tl.constexpr = A == PA and B == PB
    inside = (i < A)[:, None, None] & (j < B)[None, None, :]
    reach_channel = tl.load(reach_ptr + n_means) if HAS_CHANNEL else 1.0
    if HAS_CHANNEL:
        channel = tl.load(channel_ptr + place, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for first in tl.range(tl.program_id(0) * TOKENS, n, tl.num_programs(0) * TOKENS, num_stages=STAGES):
        rows = first + tl.arange(0, TOKENS)
        alive = rows < n
        safe = tl.minimum(rows, n - 1)
        kind = safe * 0
        clip_kind = kind
        if HAS_TYPES:
            given = tl.load(types_ptr + safe).to(tl.int32)
            kind, clip_kind = tl.minimum(given, n_means - 1), tl.minimum(given, n_clips - 1)
        clip = tl.load(clip_ptr + clip_kind)
        at = safe.to(tl.int64)[None, :, None] * (A * B) + place
        if WHOLE:
            x = tl.load(x_ptr + at)
        else:
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
        u = x.to(tl.float32)
        bound = tl.max(tl.max(tl.abs(u), 2), 0)
        if HAS_CHANNEL:
            bound *= reach_channel
        if HAS_MEAN:
            at = kind[None, :, None] * (A * B) + place
            if WHOLE:
                mean = tl.load(mean_ptr + at, eviction_policy="evict_last")
            else:
                mean = tl.load(mean_ptr + at, mask=inside, other=0.0, eviction_policy="evict_last")
            u -= mean.to(tl.float32)
            bound += tl.load(reach_ptr + kind)
        if HAS_CHANNEL:
            u *= channel
        undo = tl.maximum(bound, 1e-30) / LIMIT
        u = (u * (1.0 / undo)[None, :, None]).to(tl.float16)
        turned = tl.dot(left, tl.reshape(u, (PA, TOKENS * PB))).to(tl.float16)
        z = tl.reshape(tl.dot(tl.reshape(turned, (PA * TOKENS, PB)), right), (PA, TOKENS, PB))
        store_codes(
            z, rows, alive, clip, undo * factor, codes_ptr, stats_ptr, n, i, j, A, B, PA, PB, QMIN, QMAX, SYMMETRIC
        )  # fmt: skip
        if MARKED:  # the row's type, for the product (`reference.marked`)
            c = tl.arange(0, PR)
            further = tl.where(kind > 0, kind - 1, PR)
            mark = tl.where((c >> 1)[None, :] == further[:, None], 1.0, 0.0)
            tl.store(branch_ptr + rows[:, None] * PR + c[None, :], mark, mask=alive[:, None])


def obstacle(tables: InputTables) -> str | None:
    """Why rows are not rounded in one pass, or `None`."""
    if tables.rank:
        return f"a branch of rank {tables.rank}: it is taken off before the rotation, from the whole row"
    if tables.group:
        return "groups"
    a, b = padded(tables.a), padded(tables.b)
    if 2 * (a * a + a * b + b * b) > MOST_BYTES:
        return f"factors of {tables.a} x {tables.a} and {tables.b} x {tables.b} do not fit beside a tile"
    return None


MOST_BYTES = 128 * 1024  # of both factors and a tile in shared memory


def round_rows(
    x: torch.Tensor, types: torch.Tensor | None, tables: InputTables, *, options: dict | None = None
) -> Rows:
    """Rounded rows of `x` of shape `(n, d)`, contiguous, bfloat16 or float16; `types` `(n,)` int64; for tables without
    [`obstacle`].

    `options` overrides launch settings (`launches.py`).
    """
    n, d = x.shape
    n_means = 1 if tables.mean is None else len(tables.mean)
    rows = Rows(
        torch.empty(n, d, dtype=torch.int8, device=x.device),
        torch.empty(3, n, dtype=torch.float32, device=x.device),
        torch.empty(n, tables.branch, dtype=torch.float32, device=x.device) if tables.has_branch else None,
    )
    if n == 0:
        return rows
    if len(tables.clip) == 1 and n_means == 1:
        types = None
    qmax = (1 << (tables.bits - 1)) - 1
    launch = pass_launch(n, options or {})
    tokens = launch["tokens"]
    pdl = launch_pdl(launch["pdl"])
    _round_tiles[(min(triton.cdiv(n, tokens), launch["programs"]),)](
        x, types, tables.mean, tables.channel_scale, tables.reach, tables.left, tables.right, tables.factor, tables.clip,
        rows.codes, rows.stats, rows.branch, n, n_means, len(tables.clip),
        HAS_TYPES=types is not None, HAS_MEAN=tables.mean is not None, HAS_CHANNEL=tables.channel_scale is not None,
        MARKED=rows.branch is not None, PR=tables.branch, A=tables.a, B=tables.b, PA=padded(tables.a),
        PB=padded(tables.b), TOKENS=tokens, QMIN=-qmax - 1, QMAX=qmax, SYMMETRIC=tables.symmetric, LIMIT=HEADROOM,
        STAGES=launch["stages"], PDL=bool(pdl), num_warps=launch["warps"],
        maxnreg=launch["registers"], **pdl,
    )  # fmt: skip
    return rows
