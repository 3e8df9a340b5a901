"""Cached states that are read where they lie: what a cache layer returns in a decoding step when a kernel serves.

A [`PackedStates`] looks like the tensor of all states of a layer. `scaled_dot_product_attention` over a pair of them runs the
kernel that attends to packed rows; whatever else is done with one decodes it first, so that any attention works.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map

from optimum_freeact.kernels.kv_reference import CacheRows


class PackedStates(torch.Tensor):
    """All cached keys or values of a layer, packed.

    Args:
        rows ([`CacheRows`]): What is stored.
        pair (`Pair`): What the layer's keys and values have in common.
        size (`int`), dtype: Of the states.
        read (callable): Decodes them.
    """

    @staticmethod
    def __new__(cls, rows: CacheRows, pair: Pair, size: int, dtype: torch.dtype, read: Callable[[], torch.Tensor]):  # noqa: ARG004
        """The tensor that it looks like has no storage."""
        shape = (*rows.data.shape[:3], size)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rows.data.device)
        made.rows, made.pair, made.read = rows, pair, read
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # noqa: ARG003
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.scaled_dot_product_attention:
                found = _attend(*args, **kwargs)
                if found is not None:
                    return found
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # noqa: ARG003
        args, kwargs = tree_map(lambda x: x.read() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"PackedStates(shape={tuple(self.shape)}, dtype={self.dtype})"


class Pair:
    """Keys and values of one step of one layer.

    Args:
        start (`torch.Tensor` of shape `(batch,)`, int32): Position of each row's first real token.
    """

    def __init__(self, start: torch.Tensor):
        self.start = start


def _attend(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor | None:
    """Attention to packed rows, or `None` where the kernel does not do what was asked."""
    from optimum_freeact.kernels.kv_attend_triton import MOST_QUERIES, attend

    packed = isinstance(key, PackedStates) and isinstance(value, PackedStates) and key.pair is value.pair
    if not packed or isinstance(query, PackedStates) or query.dim() != 4 or dropout_p or is_causal:
        return None
    if query.requires_grad and torch.is_grad_enabled():
        return None
    batch, heads, tokens, size = query.shape
    key_heads, length = key.shape[1:3]
    if query.dtype != key.dtype or batch != key.shape[0] or size != key.shape[3]:
        return None
    grouped = query
    if heads != key_heads:
        if not enable_gqa or tokens != 1 or heads % key_heads:
            return None
        grouped = query.reshape(batch, key_heads, heads // key_heads, size)
    if grouped.shape[2] > MOST_QUERIES:
        return None
    if attn_mask is not None:
        every = attn_mask.dim() == 4 and attn_mask.shape[1] == attn_mask.shape[2] == 1
        if attn_mask.dtype != torch.bool or not every or attn_mask.shape[3] != length:
            return None
        attn_mask = attn_mask[:, 0, 0]
    scale = size**-0.5 if scale is None else scale
    return attend(grouped, key.rows, value.rows, key.pair.start, scale, attn_mask).reshape(query.shape)
