"""Triton: decode attention that reads packed rows of the 4-bit KV cache; the specification is `kernels.kv_reference`.

Rows are never unpacked
in memory: a program goes through a share of the tokens of one key head, for all query heads that read it, with a running
softmax; a second kernel joins the shares. Scale, low end and mean of a row follow the product of its codes:

    q k = scale * (q codes) + offset * sum(q) + q mean

where the mean turns with the rotary embedding. Its share is a product as well: a block of tokens lies at angles p + j, and
cos and sin of the sum need those of p, once, and of j, a small table that all blocks share.

Rows may be rotated: (R q) (R k) = q k, so codes meet the rotated query, and the mean and the sink, which are not rotated, the query
itself. Weights of values are those of rotated rows too: the joining kernel turns their sum back, once, and adds what the mean and
the sink have a share in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from optimum_freeact.kernels.kv_parts_triton import codes, quarter, sink_score
from optimum_freeact.kernels.kv_reference import CacheRows
from optimum_freeact.kernels.kv_turn_triton import ROTATED_AT_ONCE, join_shares, rotated
from optimum_freeact.kernels.triton_state import INTERPRETED, triton_type


MOST_QUERIES = 16  # rows of a tile
# tokens that a program reads at a time, and how many programs there are: two for each processor of an H100
LAUNCH = {"block": 128, "programs": 264, "warps": 4, "stages": 2}


@triton.jit
def _attend(
    q_ptr, turned_ptr, k_ptr, k_grid, v_ptr, v_grid, mask_ptr, start_ptr, k_exact, k_mean, cos_ptr, sin_ptr,
    near_cos, near_sin, partial_ptr, norm_ptr,
    heads, length, share, softmax_scale, kb, kh, vb, vh, mask_b,
    KT: tl.constexpr, VT: tl.constexpr,
    QUERIES: tl.constexpr, WORDS: tl.constexpr, PW: tl.constexpr, N: tl.constexpr, PN: tl.constexpr, SINK: tl.constexpr,
    K_MEAN: tl.constexpr, TURNS: tl.constexpr, HAS_MASK: tl.constexpr, TYPE: tl.constexpr,
    MAGIC: tl.constexpr, ADDED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = bh // heads
    h = bh % heads
    m = tl.arange(0, TILE)
    w = tl.arange(0, PW)
    j = tl.arange(0, STEP)
    is_query = m < QUERIES
    is_word = w < WORDS
    real = is_query[:, None] & is_word[None, :]
    q_row = q_ptr + (bh * QUERIES + m)[:, None] * 4 * WORDS
    turned_row = turned_ptr + (bh * QUERIES + m)[:, None] * 4 * WORDS
    q0 = tl.load(turned_row + 4 * w[None, :], mask=real, other=0.0)
    q1 = tl.load(turned_row + 4 * w[None, :] + 1, mask=real, other=0.0)
    q2 = tl.load(turned_row + 4 * w[None, :] + 2, mask=real, other=0.0)
    q3 = tl.load(turned_row + 4 * w[None, :] + 3, mask=real, other=0.0)
    total = tl.sum(q0.to(tl.float32) + q1.to(tl.float32) + q2.to(tl.float32) + q3.to(tl.float32), 1)
    start = tl.load(start_ptr + b)
    constant = tl.zeros((TILE,), tl.float32)
    if K_MEAN:
        mean_row = k_mean + h * 4 * WORDS
        if TURNS:
            i = tl.arange(0, PN)
            turned = is_query[:, None] & (i < N)[None, :]
            first = tl.load(q_row + i[None, :], mask=turned, other=0.0).to(tl.float32)
            second = tl.load(q_row + N + i[None, :], mask=turned, other=0.0).to(tl.float32)
            m1 = tl.load(mean_row + i, mask=i < N, other=0.0)[None, :]
            m2 = tl.load(mean_row + N + i, mask=i < N, other=0.0)[None, :]
            with_cos = first * m1 + second * m2
            with_sin = second * m1 - first * m2
            # two-byte products need numbers near one
            size = tl.maximum(tl.max(tl.abs(with_cos), 1), tl.max(tl.abs(with_sin), 1))
            size = tl.where(size == 0.0, 1.0, size)
            table = j[None, :] * N + i[:, None]
            near_c = tl.load(near_cos + table, mask=(i < N)[:, None], other=0.0)
            near_s = tl.load(near_sin + table, mask=(i < N)[:, None], other=0.0)
        rest = is_word & (4 * w >= 2 * N - 3) if TURNS else is_word  # channels that do not turn
        for side in tl.static_range(4):
            still = rest & (4 * w + side >= 2 * N) if TURNS else rest
            q = quarter(q_row, w[None, :], real, side)
            constant += tl.sum(q * quarter(mean_row, w, still, side)[None, :], 1)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    norm = tl.zeros((TILE,), tl.float32)
    lows = tl.zeros((TILE,), tl.float32)
    acc0 = tl.zeros((TILE, PW), tl.float32)
    acc1 = tl.zeros((TILE, PW), tl.float32)
    acc2 = tl.zeros((TILE, PW), tl.float32)
    acc3 = tl.zeros((TILE, PW), tl.float32)
    begin = part * share
    end = tl.minimum(begin + share, length)
    k_base = b * kb + h * kh
    v_base = b * vb + h * vh
    for at in range(begin, end, STEP):
        t = at + j
        seen = t < length
        k_row = k_base + t.to(tl.int64) * KT
        words = tl.load(k_ptr + k_row[None, :] + w[:, None], mask=seen[None, :] & is_word[:, None], other=0)
        scores = tl.dot(q0, codes(words, 0, TYPE, MAGIC), input_precision="ieee")
        scores = tl.dot(q1, codes(words, 1, TYPE, MAGIC), scores, input_precision="ieee")
        scores = tl.dot(q2, codes(words, 2, TYPE, MAGIC), scores, input_precision="ieee")
        scores = tl.dot(q3, codes(words, 3, TYPE, MAGIC), scores, input_precision="ieee")
        scale = tl.load(k_grid + k_row + WORDS, mask=seen, other=0.0).to(tl.float32)
        low = tl.load(k_grid + k_row + WORDS + 1, mask=seen, other=0.0).to(tl.float32) - ADDED * scale
        scores = scores * scale[None, :] + total[:, None] * low[None, :] + constant[:, None]
        if K_MEAN and TURNS:
            turn = tl.maximum(at - start, 0)
            ahead = tl.minimum(at - start, 0)  # a block that begins in the padding: its angles begin later
            far_c = tl.load(cos_ptr + turn * N + i, mask=i < N, other=0.0)[None, :]
            far_s = tl.load(sin_ptr + turn * N + i, mask=i < N, other=0.0)[None, :]
            by_cos = (with_cos * far_c + with_sin * far_s) / size[:, None]
            by_sin = (with_sin * far_c - with_cos * far_s) / size[:, None]
            if ahead < 0:
                table = tl.maximum(j + ahead, 0)[None, :] * N + i[:, None]
                here_c = tl.load(near_cos + table, mask=(i < N)[:, None], other=0.0)
                here_s = tl.load(near_sin + table, mask=(i < N)[:, None], other=0.0)
                mean = tl.dot(by_cos.to(here_c.dtype), here_c, input_precision="ieee")
                mean += tl.dot(by_sin.to(here_c.dtype), here_s, input_precision="ieee")
            else:
                mean = tl.dot(by_cos.to(near_c.dtype), near_c, input_precision="ieee")
                mean += tl.dot(by_sin.to(near_c.dtype), near_s, input_precision="ieee")
            scores += mean * size[:, None]
        scores *= softmax_scale
        visible = seen
        if SINK > 0:
            visible = visible & ((t < start) | (t >= start + SINK))
        if HAS_MASK:
            visible = visible & (tl.load(mask_ptr + b * mask_b + t, mask=seen, other=0) != 0)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp(highest - safe)
        p = tl.exp(scores - safe[:, None])
        norm = norm * shrink + tl.sum(p, 1)
        v_row = v_base + t.to(tl.int64) * VT
        v_scale = tl.load(v_grid + v_row + WORDS, mask=seen, other=0.0).to(tl.float32)
        v_low = tl.load(v_grid + v_row + WORDS + 1, mask=seen, other=0.0).to(tl.float32)
        v_words = tl.load(v_ptr + v_row[:, None] + w[None, :], mask=seen[:, None] & is_word[None, :], other=0)
        weighted = (p * v_scale[None, :]).to(TYPE)
        # codes count from the middle of the grid: what they are too large is taken back with the very weights that were
        # rounded and multiplied
        middle = v_low + 8 * v_scale
        lows = lows * shrink + tl.sum(p * middle[None, :] - (ADDED + 8) * weighted.to(tl.float32), 1)
        acc0 = tl.dot(weighted, codes(v_words, 0, TYPE, MAGIC), acc0 * shrink[:, None], input_precision="ieee")
        acc1 = tl.dot(weighted, codes(v_words, 1, TYPE, MAGIC), acc1 * shrink[:, None], input_precision="ieee")
        acc2 = tl.dot(weighted, codes(v_words, 2, TYPE, MAGIC), acc2 * shrink[:, None], input_precision="ieee")
        acc3 = tl.dot(weighted, codes(v_words, 3, TYPE, MAGIC), acc3 * shrink[:, None], input_precision="ieee")
        highest = new
    out = (bh * tl.num_programs(1) + part) * QUERIES + m
    sink_highest = highest
    if SINK > 0:  # the largest score, with the sink's, before anything is weighed
        for s in range(0, SINK):
            score = sink_score(
                q_row, k_exact, mask_ptr, start + s, bh * SINK + s, b * mask_b, begin, end, length, w, is_word, real, m,
                softmax_scale, WORDS, HAS_MASK,
            )  # fmt: skip
            sink_highest = tl.maximum(sink_highest, score)
    safe = tl.where(sink_highest == float("-inf"), 0.0, sink_highest)
    shrink = tl.exp(highest - safe)
    for side in tl.static_range(4):
        acc = acc0 if side == 0 else acc1 if side == 1 else acc2 if side == 2 else acc3
        acc = (acc + lows[:, None]) * shrink[:, None]
        tl.store(partial_ptr + out[:, None] * 4 * WORDS + 4 * w[None, :] + side, acc, mask=real)
    norms = norm_ptr + (2 + SINK) * out
    tl.store(norms, sink_highest, mask=is_query)
    tl.store(norms + 1, norm * shrink, mask=is_query)
    if SINK > 0:
        for s in range(0, SINK):
            score = sink_score(
                q_row, k_exact, mask_ptr, start + s, bh * SINK + s, b * mask_b, begin, end, length, w, is_word, real, m,
                softmax_scale, WORDS, HAS_MASK,
            )  # fmt: skip
            tl.store(norms + 2 + s, tl.exp(score - safe), mask=is_query)


def attend(
    query: torch.Tensor,
    keys: CacheRows,
    values: CacheRows,
    start: torch.Tensor,
    softmax_scale: float,
    mask: torch.Tensor | None = None,
    launch: dict | None = None,
) -> torch.Tensor:
    """`kv_reference.attend` from packed rows.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): All queries of a key head, at most 16; contiguous
            or not.
        keys, values ([`CacheRows`]): What is stored.
        start (`torch.Tensor` of shape `(batch,)`, int32, on the device): Position of each row's first real token.
        softmax_scale (`float`): Of the scores.
        mask (`torch.Tensor` of shape `(batch or 1, tokens)`, bool, *optional*): Tokens that all queries see.
        launch (`dict`, *optional*): Other settings than `LAUNCH`.

    Returns:
        `torch.Tensor` of the shape and dtype of `query`.
    """
    batch, heads, queries, size = query.shape
    length, words = keys.data.shape[2], size // 4
    query, launch = query.contiguous(), {**LAUNCH, **(launch or {})}
    turned = query if keys.rotation is None else rotated(query, keys.rotation)
    block = launch["block"]
    tiles = -(-length // block)
    parts = max(1, min(tiles, -(-launch["programs"] // (batch * heads))))
    share = -(-tiles // parts) * block
    parts = -(-length // share)
    partial = torch.empty(batch * heads * parts * queries, size, dtype=torch.float32, device=query.device)
    sink = 0 if keys.exact is None else keys.exact.shape[2]
    norm = torch.empty(batch * heads * parts * queries, 2 + sink, dtype=torch.float32, device=query.device)
    y = torch.empty_like(query)
    n = 0 if keys.cos is None else keys.cos.shape[1]
    kind = torch.float32 if INTERPRETED and query.dtype == torch.bfloat16 else query.dtype
    magic, added = {torch.bfloat16: (0x4300, 128.0), torch.float16: (0x6400, 1024.0)}.get(kind, (0, 0.0))
    row_words = keys.data.shape[3] // 2
    keys_there, values_there = (rows.data.view(torch.int16) for rows in (keys, values))
    half_type = torch.float32 if INTERPRETED else torch.float16
    nothing = norm
    near = (nothing, nothing)
    if keys.cos is not None and keys.sin is not None and n:
        near = (keys.cos[:block].to(half_type), keys.sin[:block].to(half_type))
    if n and len(near[0]) < block:  # a short table: a block's angles are read to its end
        near = tuple(torch.nn.functional.pad(table, (0, 0, 0, block - len(table))) for table in near)
    if mask is not None:
        mask = mask.to(torch.uint8).contiguous()
    _attend[(batch * heads, parts)](
        query.to(kind), turned.to(kind), keys_there, keys.data.view(keys.storage), values_there, values.data.view(values.storage),
        nothing if mask is None else mask, start, keys.exact if sink else nothing,
        nothing if keys.mean is None else keys.mean, keys.cos if n else nothing, keys.sin if n else nothing, *near, partial, norm,
        heads, length, share, softmax_scale, *keys_there.stride()[:2], *values_there.stride()[:2],
        0 if mask is None or len(mask) == 1 else length,
        KT=row_words, VT=row_words, QUERIES=queries, WORDS=words, PW=max(16, triton.next_power_of_2(words)), N=max(n, 1),
        PN=max(16, triton.next_power_of_2(max(n, 1))), SINK=sink, K_MEAN=keys.mean is not None, TURNS=n > 0,
        HAS_MASK=mask is not None, TYPE=triton_type(kind), MAGIC=magic, ADDED=added, TILE=MOST_QUERIES,
        STEP=block,
        num_warps=launch["warps"], num_stages=launch["stages"],
    )  # fmt: skip
    rotation = values.rotation
    join_shares[(batch * heads * queries,)](
        partial, norm, values.exact if sink else nothing, nothing if values.mean is None else values.mean,
        nothing if rotation is None else rotation, y, parts, heads,
        QUERIES=queries, SIZE=size, PS=triton.next_power_of_2(size), SINK=sink, SINKS=triton.next_power_of_2(max(sink, 1)),
        V_MEAN=values.mean is not None, ROTATED=rotation is not None, STEP=ROTATED_AT_ONCE, num_warps=1 if rotation is None else 4,
    )  # fmt: skip
    return y
