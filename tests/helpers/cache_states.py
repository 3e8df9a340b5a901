"""Random keys and values, and what a fresh quantized cache layer makes of them."""

import torch

from optimum_freeact.modules.kv_layer import FreeActCacheLayer


HEADS, SIZE = 2, 16


def states(batch=3, tokens=9, size=SIZE, dtype=torch.float64):
    return torch.randn(batch, HEADS, tokens, size, dtype=dtype), torch.randn(batch, HEADS, tokens, size, dtype=dtype)


def quantized(spec, keys, values, start=None):
    """What a fresh layer makes of states that arrive at once."""
    layer = FreeActCacheLayer(spec)
    if start is not None:
        layer.set_start(torch.tensor(start))
    return layer.update(keys, values)
