"""The cache's means as buffers of the decoder, so that they are saved and loaded with the model."""

from __future__ import annotations

import torch
from torch import nn

from optimum_freeact.modules.kv_store import CacheSpec
from optimum_freeact.modules.manners import keep_dtypes


NAME = "freeact_cache"  # the decoder's attribute


class CacheMeanBuffers(nn.Module):
    """Means of keys (before the rotary embedding) and values per layer and head; zeros where none is subtracted.

    Args:
        shapes (`list[list[int]]`): `(key_value_heads, head_dim)` of each layer's keys; empty for a layer without means.
    """

    def __init__(self, shapes: list[list[int]]):
        super().__init__()
        self._is_hf_initialized = True
        self.n_layers = len(shapes)
        for index, shape in enumerate(shapes):
            if shape:
                self.register_buffer(f"key_{index}", torch.zeros(shape))
                self.register_buffer(f"value_{index}", torch.zeros(shape))

    def fill(self, keys: list[torch.Tensor | None], values: list[torch.Tensor | None]) -> None:
        """Copy means of shape `(key_value_heads, head_dim)` per layer."""
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            if key is not None:
                getattr(self, f"key_{index}").copy_(key)
                getattr(self, f"value_{index}").copy_(value)

    def _per_layer(self, kind: str) -> list[torch.Tensor | None]:
        return [getattr(self, f"{kind}_{index}", None) for index in range(self.n_layers)]

    def spec(self, bits: int, rotate: bool, sink_tokens: int, frequencies: list[torch.Tensor | None]) -> CacheSpec:
        """The cache that these means describe; `frequencies` are the decoder's rotary ones."""
        keys = self._per_layer("key")
        known = [f if key is not None else None for key, f in zip(keys, frequencies, strict=True)]
        return CacheSpec(bits, rotate, sink_tokens, keys, known, self._per_layer("value"))

    def _apply(self, fn, recurse: bool = True) -> CacheMeanBuffers:
        return keep_dtypes(self, super()._apply, fn, recurse)
