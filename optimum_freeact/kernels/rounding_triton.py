"""Triton: centre, scale, split off the branch, rotate and round rows (`reference.round_rows`).

Three launches, each as parallel as its part of the work allows: `_project` multiplies raw rows by parts of the basis on
tensor cores (what the means would have added is taken off the result, a table); `_correct` takes means and branch out of
some rows of each token's tile and applies the right factor; `grids_triton.finish` applies the left factor to a whole tile,
finds the grids and rounds. One launch per row for everything, or two with whole rows of sixteen tokens, were two to seven times
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

from functools import partial

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.epilogue_triton import counters
from optimum_freeact.kernels.grids_triton import finish, round_flat
from optimum_freeact.kernels.launcher import start
from optimum_freeact.kernels.launches import launch_pdl, round_launch
from optimum_freeact.kernels.reference import HEADROOM, Rows, n_marks
from optimum_freeact.kernels.tables import InputTables, padded, runs_in_tiles
from optimum_freeact.kernels.triton_state import DOT_TYPE


@triton.jit
def _taken_off(
    part_ptr, peak_ptr, reach_ptr, basis_scale_ptr, safe, kind, reach, mean_branch, n, n_means,
    HAS_MEAN: tl.constexpr, HAS_CHANNEL: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """From the parts of a projection: branch, factors of the table's lines in two bfloat16 numbers each, and a bound of |u|."""
    r = tl.arange(0, PR)
    peak = tl.full((ROWS,), 0.0, tl.float32)
    for part in tl.static_range(PARTS):
        peak = tl.maximum(peak, tl.load(peak_ptr + part * n + safe, cache_modifier=".cg"))
    if HAS_CHANNEL:
        peak *= tl.load(reach_ptr + n_means)
    if HAS_MEAN:
        peak += reach
    peak = tl.maximum(peak, 1e-30)
    p = tl.zeros((ROWS, PR), tl.float32)
    factor = p
    if RANK > 0:
        in_rank = r < RANK
        for part in tl.static_range(PARTS):
            p += tl.load(part_ptr + (part * n + safe)[:, None] * PR + r[None, :], cache_modifier=".cg")
        if HAS_MEAN:
            p -= mean_branch
        scale = tl.load(basis_scale_ptr + r, mask=in_rank, other=0.0)
        p = tl.where(in_rank[None, :], p * scale[None, :], 0.0)
        factor = -p * scale[None, :]
    upper = factor.to(tl.bfloat16)
    lower = (factor - upper.to(tl.float32)).to(tl.bfloat16)
    if HAS_MEAN and not HAS_CHANNEL:
        upper = tl.where(r[None, :] == RANK + kind[:, None], -1.0, upper.to(tl.float32)).to(tl.bfloat16)
    return p, upper, lower, peak


@triton.jit
def _project(
    x_ptr, types_ptr, channel_ptr, basis_ptr, part_ptr, peak_ptr, mean_branch_ptr, reach_ptr, basis_scale_ptr, clip_ptr,
    branch_ptr, factors_ptr, undo_ptr, count_ptr, n, n_means, n_clips, MARKED: tl.constexpr,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_CHANNEL: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr,
    LIMIT: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Codes of the basis times some columns of some rows as they come, and the largest magnitude there.

    The last program of some rows to arrive makes of the parts what `_correct` needs.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    at = tl.minimum(rows, n - 1).to(tl.int64) * D
    r = tl.arange(0, PR)
    p = tl.zeros((ROWS, PR), tl.float32)
    peak = tl.zeros((ROWS, CHUNK), tl.float32)
    given = rows * 0
    if HAS_TYPES:  # there since the model's own hook ran, long before; not looked at yet, which would wait for it
        given = tl.load(types_ptr + tl.minimum(rows, n - 1))
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
                basis = tl.load(basis_ptr + r[None, :] * D + o[:, None])
            else:
                basis = tl.load(basis_ptr + r[None, :] * D + o[:, None], mask=(o < D)[:, None], other=0)
            if HAS_CHANNEL:
                u = x.to(tl.float32) * tl.load(channel_ptr + o, mask=o < D, other=0.0)[None, :]
                upper = u.to(tl.bfloat16)
                p = tl.dot((u - upper.to(tl.float32)).to(tl.bfloat16).to(DOT), basis.to(DOT), p)
                p = tl.dot(upper.to(DOT), basis.to(DOT), p)
            elif x_ptr.dtype.element_ty == tl.bfloat16:
                p = tl.dot(x.to(DOT), basis.to(DOT), p)
            else:
                p = tl.dot(x, basis.to(x_ptr.dtype.element_ty), p)
            # A look at the sum makes Triton (3.6) wait for the tensor cores. Left to itself it lets them run on while it brings
            # later rows to the very memory that they still read: x has a second reader, for which no further buffer is made
            p = tl.where(n > 0, p, 0.0)
    alive = rows < n
    safe = tl.minimum(rows, n - 1)
    # what a type has is on its way before the parts are: the last program would wait for it
    given = given.to(tl.int32)
    kind = tl.minimum(given, n_means - 1)
    clip = tl.load(clip_ptr + tl.minimum(given, n_clips - 1))
    reach, mean_branch = clip, p
    if HAS_MEAN:
        reach = tl.load(reach_ptr + kind)
        if RANK > 0:
            mean_branch = tl.load(
                mean_branch_ptr + kind[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0
            )
    tl.store(peak_ptr + part * n + rows, tl.max(peak, 1), mask=alive)
    if RANK > 0:
        tl.store(part_ptr + (part * n + rows)[:, None] * PR + r[None, :], p, mask=alive[:, None])
    if PARTS > 1:
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + tl.program_id(0), 1, sem="acq_rel")
        if arrived != PARTS - 1:
            return
        tl.store(count_ptr + tl.program_id(0), 0)  # ready for the next launch
    else:
        tl.debug_barrier()
    p, upper, lower, bound = _taken_off(
        part_ptr, peak_ptr, reach_ptr, basis_scale_ptr, safe, kind, reach, mean_branch, n, n_means, HAS_MEAN, HAS_CHANNEL,
        RANK, PR, ROWS, PARTS,
    )  # fmt: skip
    if MARKED:  # the row's type, for the product (`reference.marked`)
        further = tl.where(kind > 0, kind - 1, PR)
        p = tl.where(((r - RANK) >> 1)[None, :] == further[:, None], 1.0, p)
    if RANK > 0:
        tl.store(branch_ptr + rows[:, None] * PR + r[None, :], p, mask=alive[:, None])
    tl.store(factors_ptr + rows[:, None] * (2 * PR) + r[None, :], upper, mask=alive[:, None])
    tl.store(factors_ptr + rows[:, None] * (2 * PR) + PR + r[None, :], lower, mask=alive[:, None])
    tl.store(undo_ptr + rows, bound / LIMIT, mask=alive)
    tl.store(undo_ptr + n + rows, clip, mask=alive)  # so that no later step looks at types


@triton.jit
def _row_of_tiles(
    i, x_ptr, mean_ptr, basis_ptr, safe, kind, j, r,
    GATHERED: tl.constexpr, LINES: tl.constexpr, B: tl.constexpr, PB: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What a row of some tokens' tiles is made of: the tokens' numbers and what is to be taken off."""
    column = i * B + j
    at = safe.to(tl.int64)[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at) if B == PB else tl.load(x_ptr + at, mask=(j < B)[None, :], other=0.0)
    mean, lines = x, x
    if GATHERED:
        mean = tl.load(mean_ptr + kind[:, None] * D + column[None, :], mask=(j < B)[None, :], other=0.0)
    if LINES:
        at = r[:, None] * D + column[None, :]
        lines = tl.load(basis_ptr + at) if B == PB else tl.load(basis_ptr + at, mask=(j < B)[None, :], other=0.0)
    return x, mean, lines


@triton.jit
def _correct(
    x_ptr, types_ptr, mean_ptr, channel_ptr, basis_ptr, right_ptr, factors_ptr, undo_ptr, turned_ptr, n, n_means,
    HAS_TYPES: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_CHANNEL: tl.constexpr, RANK: tl.constexpr, PR: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, PB: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """NB rows of the tiles of some tokens: less mean and branch, in float16, times the right factor."""
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * NB
    alive = tokens < n
    safe = tl.minimum(tokens, n - 1)
    D: tl.constexpr = A * B
    GATHERED: tl.constexpr = HAS_MEAN and HAS_CHANNEL  # means are subtracted before the scale, the branch after it
    FOLDED: tl.constexpr = HAS_MEAN and not HAS_CHANNEL  # means are lines of the table as the basis is
    LINES: tl.constexpr = FOLDED or RANK > 0
    j = tl.arange(0, PB)
    r = tl.arange(0, PR)
    right = tl.load(right_ptr + j[:, None] * PB + j[None, :])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kind = tl.zeros((ROWS,), tl.int64)
    if HAS_TYPES and GATHERED:
        kind = tl.minimum(tl.load(types_ptr + safe), n_means - 1)
    if NB == 1:
        x, mean, lines = _row_of_tiles(first, x_ptr, mean_ptr, basis_ptr, safe, kind, j, r, GATHERED, LINES, B, PB, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    undo = tl.load(undo_ptr + safe)
    upper = tl.load(factors_ptr + safe[:, None] * (2 * PR) + r[None, :]).to(DOT)
    lower = tl.load(factors_ptr + safe[:, None] * (2 * PR) + PR + r[None, :]).to(DOT)
    shrink = (1.0 / undo)[:, None]
    for i in range(first, tl.minimum(first + NB, A)):
        if NB > 1:
            x, mean, lines = _row_of_tiles(i, x_ptr, mean_ptr, basis_ptr, safe, kind, j, r, GATHERED, LINES, B, PB, D)
        column = i * B + j
        u = x.to(tl.float32)
        if GATHERED:
            u -= mean.to(tl.float32)
        if HAS_CHANNEL:
            u *= tl.load(channel_ptr + column, mask=j < B, other=0.0)[None, :]
        if LINES:
            lines = lines.to(DOT)
            if RANK > 0:
                u = tl.dot(lower, lines, u)
            u = tl.dot(upper, lines, u)
        turned = tl.dot((u * shrink).to(tl.float16), right).to(tl.float16)
        tl.store(
            turned_ptr + tokens.to(tl.int64)[:, None] * D + column[None, :], turned,
            mask=alive[:, None] & (j < B)[None, :],
        )  # fmt: skip


def outputs(x: torch.Tensor, tables: InputTables) -> Rows:
    """Room for the rounded rows of `x`."""
    n, d = x.shape
    return Rows(
        torch.empty(n, d, dtype=torch.float16 if tables.group else torch.int8, device=x.device),
        torch.empty(1 if tables.group else 3, n, dtype=torch.float32, device=x.device),
        torch.empty(n, tables.branch, dtype=torch.float32, device=x.device) if tables.has_branch else None,
    )


def round_rows(
    x: torch.Tensor, types: torch.Tensor | None, tables: InputTables, *, options: dict | None = None
) -> Rows:
    """Rounded rows of `x` of shape `(n, d)`, contiguous, bfloat16 or float16; `types` `(n,)` int64.

    `options` overrides launch settings (`launches.py`).
    """
    n, d = x.shape
    rows = outputs(x, tables)
    if n == 0:
        return rows
    if tables.n_clips == 1 and tables.n_means == 1:
        types = None
    pa, pb = padded(tables.a), padded(tables.b)
    qmax = (1 << (tables.bits - 1)) - 1
    grid = {"QMIN": -qmax - 1, "QMAX": qmax, "SYMMETRIC": tables.symmetric, "GROUP": tables.group}
    flat = not runs_in_tiles(tables.a, tables.b, tables.group)
    out = torch.empty(n, d, dtype=torch.float32, device=x.device) if flat else rows.codes
    launch = round_launch(n, d, options or {})
    parts = -(-d // (launch["chunk"] * launch["steps"]))
    floats = partial(torch.empty, dtype=torch.float32, device=x.device)
    part = floats(parts, n, tables.branch) if tables.rank else None
    peak, undo = floats(parts, n), floats(2, n)
    factors = torch.empty(n, 2 * tables.branch, dtype=torch.bfloat16, device=x.device)
    turned = torch.empty(n, d, dtype=torch.float16, device=x.device)
    n_means = tables.n_means
    pdl = launch_pdl(launch["pdl"])
    has: dict[str, object] = {"HAS_TYPES": types is not None, "HAS_MEAN": tables.mean is not None}
    has |= {"HAS_CHANNEL": tables.channel_scale is not None, "RANK": tables.rank, "PR": tables.branch}
    has |= {"DOT": DOT_TYPE, "PDL": bool(pdl)}
    start(
        _project, (-(-n // launch["rows"]), parts),
        (x, types, tables.channel_scale, tables.basis, part, peak, tables.mean_branch, tables.reach, tables.basis_scale,
        tables.clip, rows.branch, factors, undo, counters(x.device), n, n_means, tables.n_clips), MARKED=tables.has_branch and n_marks(n_means) > 0, **has, D=d, ROWS=launch["rows"], CHUNK=launch["chunk"],
        STEPS=launch["steps"], PARTS=parts, LIMIT=HEADROOM, num_warps=launch["project_warps"], num_stages=4, **pdl,
    )  # fmt: skip
    nb = max(1, min(launch["elements"] // pb, pa))
    block = launch["correct_rows"]
    start(
        _correct, (-(-n // block), -(-tables.a // nb)),
        (x, types, tables.mean, tables.channel_scale, tables.basis, tables.right, factors, undo, turned, n, n_means), **has,
        A=tables.a, B=tables.b, PB=pb, ROWS=block, NB=nb, num_warps=launch["correct_warps"], num_stages=3, **pdl,
    )  # fmt: skip
    big = pa * pb > 8192
    tokens = 1 if big else min(launch["finish_rows"], padded(n))
    start(
        finish, (min(-(-n // tokens), launch["programs"] // (3 if big else 1)),),
        (turned, undo, tables.left, tables.factor, out, rows.stats, n), A=tables.a, B=tables.b, PA=pa, PB=pb, TOKENS=tokens, **grid, PDL=bool(pdl),
        num_warps=launch["finish_warps"] * (2 if big else 1), num_stages=2, **pdl,
    )  # fmt: skip
    if flat:
        finish_flat(out, undo[1], rows, tables, grid)
    return rows


def finish_flat(z: torch.Tensor, clips: torch.Tensor, rows: Rows, tables: InputTables, grid: dict) -> None:
    """Round groups of rotated rows `z`, which lie in their natural order, to `rows`; `clips` `(n,)`."""
    n, d = z.shape
    wide = padded(tables.group)
    count = max(1, 2048 // wide)
    total = n * (d // tables.group)
    pdl = launch_pdl(n <= 64)
    start(
        round_flat, (-(-total // count),),
        (z, clips, rows.codes, total), D=d, PG=wide, COUNT=count,
        **grid, PDL=bool(pdl), num_warps=4, **pdl,
    )  # fmt: skip
