"""In what precision float32 matrices are multiplied while a block learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """`"high"` (TF32, ten bits of mantissa) or `"highest"` (float32) on a GPU while it lasts; on others nothing changes.

    A gradient step does not need the last digits (published methods train in half precision); what is rounded and inverted
    does. Backward products follow whatever holds when backward runs.
    """
    before = torch.get_float32_matmul_precision()
    if device.type != "cuda" or before == precision:
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
