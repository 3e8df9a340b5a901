"""Triton: centre, scale, split off the branch, rotate and round rows (`reference.round_rows`).

Few rows take one launch (`fused`): a program per row computes the branch's coordinates in one pass over the basis and the
rest in a second. Many rows take two: `project` works on 16 rows at a time so that the basis is read once for all of them
and the branch runs on tensor cores, and leaves what remains in float16 with a factor per row; `rotate` turns and rounds
a row at a time, the factors of the rotation staying in shared memory.

Arithmetic: centring, scaling and the branch in float32 (bfloat16 pairs on tensor cores), the two products of the rotation
in float16 with float32 sums. A Hadamard factor is exact in float16, so each product rounds its left operand to 11 bits
and nothing else: eight times finer than bfloat16, the type the rows come in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.reference import Rows
from optimum_freeact.kernels.tables import InputTables, padded
from optimum_freeact.kernels.triton_state import DOT_TYPE


HEADROOM = 128.0  # largest |u| of a row in float16: a rotation may gather a whole row of 2^17 entries in one


@triton.jit
def _round_half_even(x):
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: |x| < 2^22


@triton.jit
def _store_rounded(
    z, inside, row, clip, undo, codes_ptr, stats_ptr, n, i, j,
    A: tl.constexpr, B: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Grid, codes and their sum of one row, whose values are `undo * z`."""
    low = tl.min(tl.min(tl.where(inside, z, float("inf")), 1), 0)
    high = tl.max(tl.max(tl.where(inside, z, float("-inf")), 1), 0)
    bad = tl.max(tl.max(tl.where(inside & (tl.abs(z) < float("inf")), 0, inside.to(tl.int32)), 1), 0)
    if SYMMETRIC:
        scale = tl.maximum(tl.abs(low), tl.abs(high)) * clip / (QMAX + 0.5)
        scale = tl.where(scale == 0.0, 1.0 / undo, scale)
        offset = scale * 0.0
    else:
        middle = high / 2 + low / 2
        half = (high / 2 - low / 2) * clip
        scale = half / ((QMAX - QMIN) / 2)
        offset = middle - half - scale * QMIN
        scale = tl.where(half > 0, scale, 1.0 / undo)
        offset = tl.where(half > 0, offset, middle)
    codes = _round_half_even((z - offset) / scale)
    codes = tl.minimum(tl.maximum(codes, QMIN * 1.0), QMAX * 1.0)
    codes = tl.where(inside & (bad == 0), codes, 0.0).to(tl.int32)
    HALF: tl.constexpr = B // 2  # the columns of the right factor are split, so those of z are
    column = i[:, None] * HALF + tl.where(j < HALF, j, j - HALF + A * HALF)[None, :]
    tl.store(codes_ptr + row * tl.full((), A * B, tl.int64) + column, codes.to(tl.int8), mask=inside)
    nan = tl.where(bad > 0, float("nan"), 0.0)
    tl.store(stats_ptr + row, scale * undo + nan)
    tl.store(stats_ptr + n + row, offset * undo + nan)
    tl.store(stats_ptr + 2 * n + row, tl.sum(tl.sum(codes, 1), 0).to(tl.float32))


@triton.jit
def _turn(u, left_ptr, right_ptr, PA: tl.constexpr, PB: tl.constexpr):
    """left^T u right, all float16, sums in float32."""
    ia = tl.arange(0, PA)
    jb = tl.arange(0, PB)
    right = tl.load(right_ptr + jb[:, None] * PB + jb[None, :])
    left = tl.load(left_ptr + ia[:, None] * PA + ia[None, :])
    t = tl.dot(u, right).to(tl.float16)
    return tl.dot(left, t)


@triton.jit
def _fused(
    x_ptr, types_ptr, mean_ptr, channel_ptr, basis_ptr, basis_scale_ptr, left_ptr, right_ptr, clip_ptr,
    codes_ptr, stats_ptr, branch_ptr, n, n_means, n_clips, factor_ptr,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_CHANNEL: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr, CHUNK: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    D: tl.constexpr = A * B
    x_ptr += row.to(tl.int64) * D
    kind = tl.load(types_ptr + row) if HAS_TYPES else 0
    if HAS_MEAN and HAS_TYPES:
        mean_ptr += tl.minimum(kind, n_means - 1).to(tl.int64) * D
    i = tl.arange(0, PA)
    j = tl.arange(0, PB)
    inside = (i < A)[:, None] & (j < B)[None, :]
    tile = i[:, None] * B + j[None, :]
    u = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        u -= tl.load(mean_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    if HAS_CHANNEL:
        u *= tl.load(channel_ptr + tile, mask=inside, other=0.0)
    if RANK > 0:
        r = tl.arange(0, PR)
        sums = tl.zeros((PR, CHUNK), tl.float32)
        for start in range(0, D, CHUNK):
            o = start + tl.arange(0, CHUNK)
            v = tl.load(x_ptr + o, mask=o < D, other=0.0).to(tl.float32)
            if HAS_MEAN:
                v -= tl.load(mean_ptr + o, mask=o < D, other=0.0).to(tl.float32)
            if HAS_CHANNEL:
                v *= tl.load(channel_ptr + o, mask=o < D, other=0.0)
            wanted = (r < RANK)[:, None] & (o < D)[None, :]
            sums += tl.load(basis_ptr + r[:, None] * D + o[None, :], mask=wanted, other=0).to(tl.float32) * v[None, :]
        p = tl.sum(sums, 1) * tl.load(basis_scale_ptr + r, mask=r < RANK, other=0.0)
        tl.store(branch_ptr + row * PR + r, p)
        tl.debug_barrier()
        for k in range(RANK):
            share = tl.load(branch_ptr + row * PR + k) * tl.load(basis_scale_ptr + k)
            u -= share * tl.load(basis_ptr + k * D + tile, mask=inside, other=0).to(tl.float32)
    peak = tl.maximum(tl.max(tl.max(tl.abs(u), 1), 0), 1e-30)
    z = _turn((u * (LIMIT / peak)).to(tl.float16), left_ptr, right_ptr, PA, PB)
    clip = tl.load(clip_ptr + (tl.minimum(kind, n_clips - 1) if HAS_TYPES else 0))
    undo = peak / LIMIT * tl.load(factor_ptr)
    _store_rounded(z, inside, row, clip, undo, codes_ptr, stats_ptr, n, i, j, A, B, QMIN, QMAX, SYMMETRIC)


@triton.jit
def _project(
    x_ptr, types_ptr, mean_ptr, channel_ptr, basis_ptr, basis_scale_ptr, rest_ptr, peak_ptr, branch_ptr, n, n_means,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_CHANNEL: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, LIMIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = rows < n
    at = rows.to(tl.int64) * D
    kind = tl.load(types_ptr + rows, mask=alive, other=0) if HAS_TYPES else tl.zeros((ROWS,), tl.int64)
    mean_at = tl.minimum(kind, n_means - 1) * D
    r = tl.arange(0, PR)
    p = tl.zeros((ROWS, PR), tl.float32)
    peak = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, CHUNK):
        o = start + tl.arange(0, CHUNK)
        wanted = alive[:, None] & (o < D)[None, :]
        u = tl.load(x_ptr + at[:, None] + o[None, :], mask=wanted, other=0.0).to(tl.float32)
        if HAS_MEAN:
            u -= tl.load(mean_ptr + mean_at[:, None] + o[None, :], mask=wanted, other=0.0).to(tl.float32)
        if HAS_CHANNEL:
            u *= tl.load(channel_ptr + o, mask=o < D, other=0.0)[None, :]
        peak = tl.maximum(peak, tl.max(tl.abs(u), 1))
        if RANK > 0:
            basis = tl.load(
                basis_ptr + r[None, :] * D + o[:, None], mask=(r < RANK)[None, :] & (o < D)[:, None], other=0
            ).to(DOT)
            upper = u.to(tl.bfloat16)
            p = tl.dot((u - upper.to(tl.float32)).to(tl.bfloat16).to(DOT), basis, p)
            p = tl.dot(upper.to(DOT), basis, p)
    peak = tl.maximum(peak, 1e-30)
    tl.store(peak_ptr + rows, peak, mask=alive)
    scale = tl.load(basis_scale_ptr + r, mask=r < RANK, other=0.0) if RANK > 0 else tl.zeros((PR,), tl.float32)
    p = p * scale[None, :]
    if RANK > 0:
        tl.store(branch_ptr + rows[:, None] * PR + r[None, :], p, mask=alive[:, None])
    p = p * scale[None, :]
    p_upper = p.to(tl.bfloat16)
    p_lower = (p - p_upper.to(tl.float32)).to(tl.bfloat16).to(DOT)
    p_upper = p_upper.to(DOT)
    for start in range(0, D, CHUNK):
        o = start + tl.arange(0, CHUNK)
        wanted = alive[:, None] & (o < D)[None, :]
        u = tl.load(x_ptr + at[:, None] + o[None, :], mask=wanted, other=0.0).to(tl.float32)
        if HAS_MEAN:
            u -= tl.load(mean_ptr + mean_at[:, None] + o[None, :], mask=wanted, other=0.0).to(tl.float32)
        if HAS_CHANNEL:
            u *= tl.load(channel_ptr + o, mask=o < D, other=0.0)[None, :]
        if RANK > 0:
            basis = tl.load(
                basis_ptr + r[:, None] * D + o[None, :], mask=(r < RANK)[:, None] & (o < D)[None, :], other=0
            ).to(DOT)
            u -= tl.dot(p_upper, basis, tl.dot(p_lower, basis))
        tl.store(rest_ptr + at[:, None] + o[None, :], (u * (LIMIT / peak)[:, None]).to(tl.float16), mask=wanted)


@triton.jit
def _rotate(
    rest_ptr, peak_ptr, types_ptr, left_ptr, right_ptr, clip_ptr, codes_ptr, stats_ptr, n, n_clips, factor_ptr,
    HAS_TYPES: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PA: tl.constexpr, PB: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, PA)
    j = tl.arange(0, PB)
    inside = (i < A)[:, None] & (j < B)[None, :]
    right = tl.load(right_ptr + j[:, None] * PB + j[None, :])
    left = tl.load(left_ptr + i[:, None] * PA + i[None, :])
    factor = tl.load(factor_ptr)
    for row in range(tl.program_id(0), n, tl.num_programs(0)):
        tile = row * tl.full((), A * B, tl.int64) + i[:, None] * B + j[None, :]
        u = tl.load(rest_ptr + tile, mask=inside, other=0.0)
        z = tl.dot(left, tl.dot(u, right).to(tl.float16))
        kind = tl.load(types_ptr + row) if HAS_TYPES else 0
        clip = tl.load(clip_ptr + (tl.minimum(kind, n_clips - 1) if HAS_TYPES else 0))
        undo = tl.load(peak_ptr + row) / LIMIT * factor
        _store_rounded(z, inside, row, clip, undo, codes_ptr, stats_ptr, n, i, j, A, B, QMIN, QMAX, SYMMETRIC)


def round_rows(
    x: torch.Tensor, types: torch.Tensor | None, tables: InputTables, *, few: bool, options: dict | None = None
) -> Rows:
    """Rounded rows of `x` of shape `(n, d)`, contiguous, bfloat16 or float16; `types` `(n,)` int64.

    `few` takes one launch, best below some dozens of rows; `options` overrides launch settings (for tuning).
    """
    n, d = x.shape
    options = options or {}
    codes = torch.empty(n, d, dtype=torch.int8, device=x.device)
    stats = torch.empty(3, n, dtype=torch.float32, device=x.device)
    branch = torch.empty(n, tables.branch, dtype=torch.float32, device=x.device) if tables.rank else None
    if n == 0:
        return Rows(codes, stats, branch)
    if types is not None and len(tables.clip) == 1 and (tables.mean is None or len(tables.mean) == 1):
        types = None
    pa, pb = padded(tables.a), padded(tables.b)
    qmax = (1 << (tables.bits - 1)) - 1
    n_means = 1 if tables.mean is None else len(tables.mean)
    maps = (types, tables.mean, tables.channel_scale, tables.basis, tables.basis_scale)
    has = {"HAS_TYPES": types is not None, "HAS_MEAN": tables.mean is not None}
    has |= {"HAS_CHANNEL": tables.channel_scale is not None, "RANK": tables.rank, "PR": tables.branch}
    grid = {"QMIN": -qmax - 1, "QMAX": qmax, "SYMMETRIC": tables.symmetric, "LIMIT": HEADROOM}
    tile = {"A": tables.a, "B": tables.b, "PA": pa, "PB": pb}
    big = pa * pb > 8192
    if few:
        _fused[(n,)](
            x, *maps, tables.left, tables.right, tables.clip, codes, stats, branch, n, n_means, len(tables.clip),
            tables.factor, **has, **tile, **grid, CHUNK=options.get("chunk", 512),
            num_warps=options.get("warps", 16 if big else 8),
        )  # fmt: skip
        return Rows(codes, stats, branch)
    rest = torch.empty(n, d, dtype=torch.float16, device=x.device)
    peak = torch.empty(n, dtype=torch.float32, device=x.device)
    rows = options.get("rows", 16)
    _project[(triton.cdiv(n, rows),)](
        x, *maps, rest, peak, branch, n, n_means, **has, D=d, ROWS=rows, CHUNK=options.get("project_chunk", 256),
        LIMIT=HEADROOM, DOT=DOT_TYPE, num_warps=options.get("project_warps", 4), num_stages=options.get("project_stages", 3),
    )  # fmt: skip
    programs = min(n, options.get("programs", 132 * (2 if big else 6)))
    _rotate[(programs,)](
        rest, peak, types, tables.left, tables.right, tables.clip, codes, stats, n, len(tables.clip), tables.factor,
        HAS_TYPES=types is not None, **tile, **grid, num_warps=options.get("rotate_warps", 8 if big else 4),
        num_stages=options.get("rotate_stages", 2),
    )  # fmt: skip
    return Rows(codes, stats, branch)
