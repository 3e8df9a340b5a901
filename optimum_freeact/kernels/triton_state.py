"""How the Triton kernels of this process are run: compiled, or by Triton's interpreter (`TRITON_INTERPRET=1`)."""

from __future__ import annotations

import torch
import triton.language as tl
from triton import knobs


# The interpreter runs on numpy: no inline assembly, and no products of bfloat16 (values are rounded to it all the same)
INTERPRETED = bool(knobs.runtime.interpret)
DOT_TYPE = tl.float32 if INTERPRETED else tl.bfloat16


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a floating type."""
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
