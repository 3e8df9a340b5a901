"""What the kernels of the KV cache compute, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_freeact.numerics.vector_codec import decode


@dataclass
class CacheRows:
    """Cached states of one kind (keys or values) of a layer, as kernels read them.

    Args:
        data (`uint8`, shape `(batch, heads, tokens, row bytes)`): Rows of `numerics.vector_codec`, 4 bits.
        storage (`torch.dtype`): Two-byte type of the grids.
        rotation (`float32`, shape `(head_dim, head_dim)`, *optional*): Orthogonal; what a row holds was multiplied by it. Nothing
            else here is.
        mean (`float32`, shape `(heads, head_dim)`, *optional*): Added to what a row stands for.
        cos, sin (`float32`, shape `(positions, n)`, *optional*): By which the mean turns with a token's position.
        exact (`torch.Tensor` of shape `(batch, heads, sink tokens, head_dim)`, *optional*): States of the sink, from each
            row's start on, that take the place of what was rounded.
    """

    data: torch.Tensor
    storage: torch.dtype
    mean: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    exact: torch.Tensor | None = None
    rotation: torch.Tensor | None = None


def states(rows: CacheRows, start: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """What rows stand for, in `dtype` (float32 or float64), `(batch, heads, tokens, head_dim)`."""
    values = decode(rows.data, 4, size, rows.storage, dtype)
    if rows.rotation is not None:
        values = values @ rows.rotation.to(dtype).mT
    index = torch.arange(rows.data.shape[2], device=rows.data.device)[None] - start[:, None].long()  # (batch, tokens)
    if rows.mean is not None:
        mean = rows.mean.to(dtype)[None, :, None]  # (1, heads, 1, head_dim)
        if rows.cos is not None:
            assert rows.sin is not None
            n = rows.cos.shape[1]
            cos, sin = (table.to(dtype)[index.clamp_min(0)][:, None] for table in (rows.cos, rows.sin))
            first, second, rest = mean.split((n, n, size - 2 * n), -1)
            turned = (first * cos - second * sin, second * cos + first * sin)
            mean = torch.cat((*turned, rest.expand(*turned[0].shape[:-1], -1)), -1)
        values = values + mean
    if rows.exact is not None:
        sink = rows.exact.shape[2]
        exact = rows.exact.to(dtype).gather(
            2, index.clamp(0, sink - 1)[:, None, :, None].expand(-1, values.shape[1], -1, size)
        )
        values = torch.where(((index >= 0) & (index < sink))[:, None, :, None], exact, values)
    return values


def attend(
    query: torch.Tensor,
    keys: CacheRows,
    values: CacheRows,
    start: torch.Tensor,
    softmax_scale: float,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Attention of `query` `(batch, key heads, queries, head_dim)` to all cached tokens that `mask` `(batch or 1, tokens)`
    shows; arithmetic in `dtype`.
    """
    size = query.shape[-1]
    scores = query.to(dtype) @ states(keys, start, size, dtype).mT * softmax_scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ states(values, start, size, dtype)).to(query.dtype)
