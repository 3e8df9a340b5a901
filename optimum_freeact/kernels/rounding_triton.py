"""Triton: centre, scale, split off the branch, rotate and round rows (`reference.round_rows`).

Three launches, each as parallel as its part of the work allows: `_project` multiplies raw rows by parts of the basis on
tensor cores (what the means would have added is taken off the result, a table); `_correct` takes means and branch out of
some rows of each token's tile and applies the right factor; `_finish` applies the left factor to a whole tile, finds the
grid and rounds. One launch per row for everything, or two with whole rows of sixteen tokens, were two to seven times
slower (benchmarks/speed, docs/log.md). Every number goes through few instructions: means and branch are products on the
tensor cores whose accumulator starts as the row itself.

Arithmetic: centring, scaling and the branch in float32 (bfloat16 pairs on tensor cores), the two products of the rotation
in float16 with float32 sums. A Hadamard factor is exact in float16, so each product rounds its left operand to 11 bits
and nothing else: eight times finer than bfloat16, the type the rows come in.

With programmatic dependent launch a kernel starts while the one before still runs and waits where it first reads what that
one wrote. `_project` lets the next start only once its own input is there, so that `_correct` may read the same input
before it waits; nothing is written before the wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.launches import launch_pdl, round_launch
from optimum_freeact.kernels.reference import Rows
from optimum_freeact.kernels.tables import InputTables, padded
from optimum_freeact.kernels.triton_state import DOT_TYPE


HEADROOM = 128.0  # largest |u| of a row in float16: a rotation may gather a whole row of 2^17 entries in one


@triton.jit
def _store_rounded(
    z, inside, row, clip, undo, codes_ptr, stats_ptr, n, i, j,
    A: tl.constexpr, B: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid, codes and their sum of one row, whose values are `undo * z`.

    What is not finite anywhere in a row was spread over all of it by the rotation, so the extremes tell.
    """
    low = tl.min(tl.min(z if WHOLE else tl.where(inside, z, float("inf")), 1), 0)
    high = tl.max(tl.max(z if WHOLE else tl.where(inside, z, float("-inf")), 1), 0)
    bad = (tl.abs(high - low) < float("inf")) == 0
    if SYMMETRIC:
        scale = tl.maximum(tl.abs(low), tl.abs(high)) * clip / (QMAX + 0.5)
        scale = tl.where(scale > 0, scale, 1.0 / undo)
        offset = scale * 0.0
    else:
        middle = high / 2 + low / 2
        half = (high / 2 - low / 2) * clip
        scale = half / ((QMAX - QMIN) / 2)
        offset = middle - half - scale * QMIN
        scale = tl.where(half > 0, scale, 1.0 / undo)
        offset = tl.where(half > 0, offset, middle)
    # rounding half to even: added to 1.5 * 2^23 a number has its integer part in its last bits
    steps = tl.minimum(tl.maximum(z * (1.0 / scale) - offset / scale, QMIN * 1.0), QMAX * 1.0)
    codes = (steps + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    codes = tl.where(bad, 0, codes)
    if not WHOLE:
        codes = tl.where(inside, codes, 0)
    HALF: tl.constexpr = B // 2  # the columns of the right factor are split, so those of z are
    column = i[:, None] * HALF + tl.where(j < HALF, j, j - HALF + A * HALF)[None, :]
    if WHOLE:
        tl.store(codes_ptr + row * tl.full((), A * B, tl.int64) + column, codes.to(tl.int8))
    else:
        tl.store(codes_ptr + row * tl.full((), A * B, tl.int64) + column, codes.to(tl.int8), mask=inside)
    nan = tl.where(bad, float("nan"), 0.0)
    tl.store(stats_ptr + row, scale * undo + nan)
    tl.store(stats_ptr + n + row, offset * undo + nan)
    tl.store(stats_ptr + 2 * n + row, tl.sum(tl.sum(codes, 1), 0).to(tl.float32))


@triton.jit
def _project(
    x_ptr, channel_ptr, basis_ptr, part_ptr, peak_ptr, n,
    HAS_CHANNEL: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Codes of the basis times some columns of some rows as they come, and the largest magnitude there."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    at = tl.minimum(rows, n - 1).to(tl.int64) * D
    r = tl.arange(0, PR)
    basis_at = tl.minimum(r, RANK - 1) * D  # rows past the last give columns that nobody reads
    p = tl.zeros((ROWS, PR), tl.float32)
    peak = tl.zeros((ROWS, CHUNK), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for step in range(STEPS):
        o = (part * STEPS + step) * CHUNK + tl.arange(0, CHUNK)
        if D % (CHUNK * STEPS) == 0:
            x = tl.load(x_ptr + at[:, None] + o[None, :])
        else:
            x = tl.load(x_ptr + at[:, None] + o[None, :], mask=(o < D)[None, :], other=0.0)
        peak = tl.maximum(peak, tl.abs(x.to(tl.float32)))
        if RANK > 0:
            if D % (CHUNK * STEPS) == 0:
                basis = tl.load(basis_ptr + basis_at[None, :] + o[:, None])
            else:
                basis = tl.load(basis_ptr + basis_at[None, :] + o[:, None], mask=(o < D)[:, None], other=0)
            if HAS_CHANNEL:
                u = x.to(tl.float32) * tl.load(channel_ptr + o, mask=o < D, other=0.0)[None, :]
                upper = u.to(tl.bfloat16)
                p = tl.dot((u - upper.to(tl.float32)).to(tl.bfloat16).to(DOT), basis.to(DOT), p)
                p = tl.dot(upper.to(DOT), basis.to(DOT), p)
            else:
                EXACT: tl.constexpr = tl.float32 if DOT == tl.float32 else x_ptr.dtype.element_ty
                p = tl.dot(x.to(EXACT), basis.to(EXACT), p)
    alive = rows < n
    tl.store(peak_ptr + part * n + rows, tl.max(peak, 1), mask=alive)
    if RANK > 0:
        tl.store(part_ptr + (part * n + rows)[:, None] * PR + r[None, :], p, mask=alive[:, None])


@triton.jit
def _correct(
    x_ptr, types_ptr, mean_ptr, mean_branch_ptr, reach_ptr, channel_ptr, basis_ptr, basis_scale_ptr, right_ptr,
    part_ptr, peak_ptr, turned_ptr, branch_ptr, undo_ptr, n, n_means,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_CHANNEL: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr,
    PM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PB: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr,
    PARTS: tl.constexpr, LIMIT: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """NB rows of the tiles of some tokens: less mean and branch, in float16, times the right factor."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * NB
    alive = tokens < n
    safe = tl.minimum(tokens, n - 1)
    D: tl.constexpr = A * B
    j = tl.arange(0, PB)
    r = tl.arange(0, PR)
    k = tl.arange(0, PM)
    right = tl.load(right_ptr + j[:, None] * PB + j[None, :])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kind = tl.zeros((ROWS,), tl.int64)
    if HAS_TYPES:
        kind = tl.minimum(tl.load(types_ptr + safe), n_means - 1)
        whose = (kind[:, None] == k[None, :]).to(tl.float32).to(DOT)
    if PDL:
        tl.extra.cuda.gdc_wait()
    peak = tl.full((ROWS,), 0.0, tl.float32)
    for part in tl.static_range(PARTS):
        peak = tl.maximum(peak, tl.load(peak_ptr + part * n + safe))
    if HAS_CHANNEL:
        peak *= tl.load(reach_ptr + n_means)
    if HAS_MEAN:
        peak += tl.load(reach_ptr + kind)
    peak = tl.maximum(peak, 1e-30)
    if RANK > 0:
        in_rank = r < RANK
        p = tl.zeros((ROWS, PR), tl.float32)
        for part in tl.static_range(PARTS):
            p += tl.load(part_ptr + (part * n + safe)[:, None] * PR + r[None, :])
        if HAS_MEAN:
            p -= tl.load(mean_branch_ptr + kind[:, None] * RANK + r[None, :], mask=in_rank[None, :], other=0.0)
        scale = tl.load(basis_scale_ptr + r, mask=in_rank, other=0.0)
        p = tl.where(in_rank[None, :], p * scale[None, :], 0.0)
        if tl.program_id(1) == 0:
            tl.store(branch_ptr + tokens[:, None] * PR + r[None, :], p, mask=alive[:, None])
        p = -p * scale[None, :]
        upper = p.to(tl.bfloat16)
        lower = (p - upper.to(tl.float32)).to(tl.bfloat16).to(DOT)
        upper = upper.to(DOT)
    if tl.program_id(1) == 0:
        tl.store(undo_ptr + tokens, peak / LIMIT, mask=alive)
    shrink = (LIMIT / peak)[:, None]
    for i in range(first, tl.minimum(first + NB, A)):
        column = i * B + j
        inside = j < B
        if B == PB:
            x = tl.load(x_ptr + safe.to(tl.int64)[:, None] * D + column[None, :])
        else:
            x = tl.load(x_ptr + safe.to(tl.int64)[:, None] * D + column[None, :], mask=inside[None, :], other=0.0)
        u = x.to(tl.float32)
        if HAS_MEAN:
            if HAS_TYPES:
                mean = tl.load(
                    mean_ptr + k[:, None] * D + column[None, :],
                    mask=(k < n_means)[:, None] & inside[None, :],
                    other=0.0,
                ).to(DOT)
                u = tl.dot(whose, -mean, u)
            else:
                u -= tl.load(mean_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_CHANNEL:
            u *= tl.load(channel_ptr + column, mask=inside, other=0.0)[None, :]
        if RANK > 0:
            basis = tl.load(
                basis_ptr + tl.minimum(r, RANK - 1)[:, None] * D + column[None, :], mask=inside[None, :], other=0
            ).to(DOT)
            u = tl.dot(upper, basis, tl.dot(lower, basis, u))
        turned = tl.dot((u * shrink).to(tl.float16), right).to(tl.float16)
        tl.store(
            turned_ptr + tokens.to(tl.int64)[:, None] * D + column[None, :], turned,
            mask=alive[:, None] & inside[None, :],
        )  # fmt: skip


@triton.jit
def _finish(
    turned_ptr, undo_ptr, types_ptr, left_ptr, clip_ptr, factor_ptr, codes_ptr, stats_ptr, n, n_clips,
    HAS_TYPES: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Whole tiles: times the left factor, rounded."""
    i = tl.arange(0, PA)
    j = tl.arange(0, PB)
    inside = (i < A)[:, None] & (j < B)[None, :]
    left = tl.load(left_ptr + i[:, None] * PA + i[None, :])
    factor = tl.load(factor_ptr)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        tile = row * tl.full((), A * B, tl.int64) + i[:, None] * B + j[None, :]
        if A == PA and B == PB:
            z = tl.dot(left, tl.load(turned_ptr + tile))
        else:
            z = tl.dot(left, tl.load(turned_ptr + tile, mask=inside, other=0.0))
        kind = tl.load(types_ptr + row) if HAS_TYPES else 0
        clip = tl.load(clip_ptr + (tl.minimum(kind, n_clips - 1) if HAS_TYPES else 0))
        undo = tl.load(undo_ptr + row) * factor
        _store_rounded(
            z, inside, row, clip, undo, codes_ptr, stats_ptr, n, i, j, A, B, QMIN, QMAX, SYMMETRIC,
            A == PA and B == PB,
        )  # fmt: skip


def round_rows(
    x: torch.Tensor, types: torch.Tensor | None, tables: InputTables, *, options: dict | None = None
) -> Rows:
    """Rounded rows of `x` of shape `(n, d)`, contiguous, bfloat16 or float16; `types` `(n,)` int64.

    `options` overrides launch settings (`launches.py`).
    """
    n, d = x.shape
    codes = torch.empty(n, d, dtype=torch.int8, device=x.device)
    stats = torch.empty(3, n, dtype=torch.float32, device=x.device)
    branch = torch.empty(n, tables.branch, dtype=torch.float32, device=x.device) if tables.rank else None
    if n == 0:
        return Rows(codes, stats, branch)
    if len(tables.clip) == 1 and (tables.mean is None or len(tables.mean) == 1):
        types = None
    pa, pb = padded(tables.a), padded(tables.b)
    qmax = (1 << (tables.bits - 1)) - 1
    launch = {**round_launch(n, d), **(options or {})}
    rows, chunk = launch["rows"], launch["chunk"]
    steps = min(launch["steps"], triton.cdiv(d, chunk))
    parts = triton.cdiv(d, chunk * steps)
    part = torch.empty(parts, n, tables.branch, dtype=torch.float32, device=x.device) if tables.rank else None
    peak = torch.empty(parts, n, dtype=torch.float32, device=x.device)
    undo = torch.empty(n, dtype=torch.float32, device=x.device)
    turned = torch.empty(n, d, dtype=torch.float16, device=x.device)
    n_means = 1 if tables.mean is None else len(tables.mean)
    pdl = launch_pdl(launch["pdl"])
    has = {"HAS_CHANNEL": tables.channel_scale is not None, "RANK": tables.rank, "PR": tables.branch}
    _project[(triton.cdiv(n, rows), parts)](
        x, tables.channel_scale, tables.basis, part, peak, n, **has, D=d, ROWS=rows, CHUNK=chunk, STEPS=steps,
        DOT=DOT_TYPE, PDL=bool(pdl), num_warps=launch["project_warps"], num_stages=4, **pdl,
    )  # fmt: skip
    nb = max(1, min(launch["elements"] // pb, pa))
    block = launch["correct_rows"]
    _correct[(triton.cdiv(n, block), triton.cdiv(tables.a, nb))](
        x, types, tables.mean, tables.mean_branch, tables.reach, tables.channel_scale, tables.basis,
        tables.basis_scale, tables.right, part, peak, turned, branch, undo, n, n_means, HAS_TYPES=types is not None,
        HAS_MEAN=tables.mean is not None, **has, PM=padded(n_means), A=tables.a, B=tables.b, PB=pb, ROWS=block, NB=nb,
        PARTS=parts, LIMIT=HEADROOM, DOT=DOT_TYPE, PDL=bool(pdl), num_warps=launch["correct_warps"], num_stages=3, **pdl,
    )  # fmt: skip
    big = pa * pb > 8192
    programs = min(n, launch["programs"] // (3 if big else 1))
    _finish[(programs,)](
        turned, undo, types, tables.left, tables.clip, tables.factor, codes, stats, n, len(tables.clip),
        HAS_TYPES=types is not None, A=tables.a, B=tables.b, PA=pa, PB=pb, QMIN=-qmax - 1, QMAX=qmax,
        SYMMETRIC=tables.symmetric, PDL=bool(pdl), num_warps=launch["finish_warps"] * (2 if big else 1), num_stages=2,
        **pdl,
    )  # fmt: skip
    return Rows(codes, stats, branch)
