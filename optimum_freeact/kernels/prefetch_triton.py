"""Triton: cache lines asked for before the loads that want them know where to look."""

from __future__ import annotations

import triton
import triton.language as tl


LINE = tl.constexpr(128)  # bytes
MOST_BYTES = 1 << 14  # of a table that is asked for whole; a larger one is of many types, of which a batch has few


@triton.jit
def ask_for(pointer, numbers, LINES: tl.constexpr, SIZE: tl.constexpr):
    """Lets the `numbers` numbers of SIZE bytes from `pointer` on come to the L2 cache, in LINES lines; nothing waits for them.

    For few of a launch's programs: the cache answers every request, also for lines that are there. On an H200 a product whose programs
    all asked for two thousand bytes each lost by it more than by the loads that it was to hide.
    """
    EACH: tl.constexpr = LINE // SIZE
    place = pointer + tl.minimum(tl.arange(0, LINES) * EACH, numbers - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
    )


def lines_of(numbers: int, size: int) -> int:
    """LINES of [`ask_for`], a power of two; 0 where there are too many."""
    if numbers * size > MOST_BYTES:
        return 0
    return triton.next_power_of_2(-(-numbers * size // LINE.value))
