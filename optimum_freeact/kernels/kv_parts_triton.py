"""Triton: pieces of attention over packed rows: codes as numbers, and keys that are kept exact."""

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
