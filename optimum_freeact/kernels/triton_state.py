"""How the Triton kernels of this process are run: compiled, or by Triton's interpreter (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs


# The interpreter runs on numpy: no inline assembly, and no products of bfloat16 (values are rounded to it all the same)
INTERPRETED = bool(knobs.runtime.interpret)
DOT_TYPE = tl.float32 if INTERPRETED else tl.bfloat16


@triton.jit
def prefetch(address, size):
    """Ask for `size` bytes (a multiple of 16) at each address to be brought to the second-level cache; Hopper and later."""
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }", "=r,l,r", [address.to(tl.int64), size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
