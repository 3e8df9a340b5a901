"""Triton: pieces of attention over packed rows: codes as numbers, keys that are kept exact, shares of the tokens joined."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes(words, SIDE: tl.constexpr, TYPE: tl.constexpr, MAGIC: tl.constexpr):
    """Nibble `SIDE` of each 16-bit word plus a power of two: the word's low bits become a number's last ones."""
    nibble = (words >> (4 * SIDE)) & 15
    if MAGIC == 0:
        return nibble.to(TYPE)
    return (nibble | MAGIC).to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def quarter(ptr, w, inside, SIDE: tl.constexpr):
    """Channels `4 w + SIDE` of a row in float32."""
    return tl.load(ptr + 4 * w + SIDE, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sink_score(
    q_row, k_exact, mask_ptr, t, row, mask_row, begin, end, length, w, is_word, real, m, softmax_scale,
    WORDS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Score of one exact key for all queries, minus infinity where it is another program's or not seen."""
    score = tl.zeros(m.shape, tl.float32)
    for side in tl.static_range(4):
        key = quarter(k_exact + row * 4 * WORDS, w, is_word, side)
        score += tl.sum(quarter(q_row, w[None, :], real, side) * key[None, :], 1)
    here = t + tl.zeros(m.shape, tl.int32)
    scored = (here >= begin) & (here < end)
    if HAS_MASK:
        shown = tl.load(mask_ptr + mask_row + tl.minimum(t, length - 1))
        scored = scored & ((shown + tl.zeros(m.shape, tl.int32)) != 0)
    return tl.where(scored, score * softmax_scale, float("-inf"))


@triton.jit
def join_shares(partial_ptr, norm_ptr, y_ptr, parts, QUERIES: tl.constexpr, SIZE: tl.constexpr, PS: tl.constexpr):
    """One query's output from the running softmax of each share of the tokens."""
    row = tl.program_id(0).to(tl.int64)
    bh = row // QUERIES
    query = row % QUERIES
    k = tl.arange(0, PS)
    highest = float("-inf")
    for part in range(0, parts):
        highest = tl.maximum(highest, tl.load(norm_ptr + 2 * ((bh * parts + part) * QUERIES + query)))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    acc = tl.zeros((PS,), tl.float32)
    norm = 0.0
    for part in range(0, parts):
        at = (bh * parts + part) * QUERIES + query
        weight = tl.exp(tl.load(norm_ptr + 2 * at) - safe)
        norm += weight * tl.load(norm_ptr + 2 * at + 1)
        acc += weight * tl.load(partial_ptr + at * SIZE + k, mask=k < SIZE, other=0.0)
    y = acc / norm
    tl.store(y_ptr + row * SIZE + k, y.to(y_ptr.dtype.element_ty), mask=k < SIZE)
