"""Layers of a transformers cache that hold keys and values in 4 or 8 bits.

Each cached vector (one token, one head) is a row of bytes that carries its own grid (`numerics.vector_codec`), kept in
`keys` and `values` with the shape `(batch, heads, tokens, row bytes)`. Everything that transformers does to a cache
(crop, beam reordering, batch selection, offloading, sliding windows) slices or indexes the first three dimensions, so
the inherited code works on the rows as it does on the states; only what enters and leaves `update` differs.

`update` returns all cached states dequantized, those just written included: attention during prefill sees the same
error as during decoding, and logits do not depend on how a text is cut into calls. Cost: each call unpacks the whole
layer, O(tokens x heads x head_dim) on top of attention's own pass over the same states (with `rotate` times head_dim),
and holds one layer's states in the model's type for the time of its attention.

Gradients reach the states of the current call unchanged (straight-through); cached ones are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.vector_codec import decode, encode, grid_dtype


@dataclass(frozen=True, eq=False)
class CacheSpec:
    """How to store keys and values.

    Args:
        bits (`int`, *optional*, defaults to 4): 4, 8, or 16 for the model's own cache, left as it is.
        rotate (`bool`, *optional*, defaults to `False`):
            Rotate each vector by a random Hadamard matrix before rounding and back after. Exact without rounding.
        sink_tokens (`int`, *optional*, defaults to 1):
            Number of positions, from the first real token of each row on, kept in the model's type. The first token
            is the attention sink: its keys and values are unlike all others and every later token reads them.
        key_mean (sequence of `torch.Tensor` of shape `(key_value_heads, head_dim)`, *optional*):
            One per model layer (`None` entries are skipped): subtracted before rounding and added back after.
        value_mean (sequence of `torch.Tensor` of shape `(key_value_heads, head_dim)`, *optional*):
            The same for values.
        seed (`int`, *optional*, defaults to 0): Of the rotation.

    Raises:
        `ValueError`: if `bits` or `sink_tokens` is not allowed.
    """

    bits: int = 4
    rotate: bool = False
    sink_tokens: int = 1
    key_mean: Sequence[torch.Tensor | None] | None = None
    value_mean: Sequence[torch.Tensor | None] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.bits not in (4, 8, 16):
            raise ValueError(f"bits of the KV cache must be 4, 8 or 16, got {self.bits!r}; 16 leaves it unquantized.")
        if not isinstance(self.sink_tokens, int) or self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be an integer of at least 0, got {self.sink_tokens!r}; 0 keeps none.")


@lru_cache(maxsize=32)
def _rotation(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One rotation of `size`, shared by all layers of all caches; never modified."""
    with torch.inference_mode(False):  # it outlives the caller's inference mode
        return flat_rotation(size, torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


class StateStore:
    """One kind of states (keys or values) of one layer: rows in and out, and the exact states of the sink.

    Args:
        spec ([`CacheSpec`]): Bits, rotation, number of sink tokens.
        mean (`torch.Tensor` of shape `(heads, head_dim)`, *optional*): Subtracted before rounding, added back after.
        states (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): Sets sizes, type and device; not stored.

    Raises:
        `ValueError`: if `mean` does not fit the states.
    """

    def __init__(self, spec: CacheSpec, mean: torch.Tensor | None, states: torch.Tensor):
        batch, heads, _, self.size = states.shape
        self.spec, self.dtype = spec, states.dtype
        self.compute_dtype = torch.promote_types(states.dtype, torch.float32)
        if mean is not None and mean.shape != (heads, self.size):
            raise ValueError(
                f"the mean of a KV cache has shape {tuple(mean.shape)}, the states have {heads} heads of {self.size}; "
                f"pass one of shape {(heads, self.size)} per model layer."
            )
        # (heads, 1, head_dim)
        self.mean = None if mean is None else mean.to(states.device, self.compute_dtype)[:, None, :]
        self.exact = states.new_zeros(batch, heads, spec.sink_tokens, self.size)

    def _rotation(self, device: torch.device) -> torch.Tensor:
        return _rotation(self.size, self.spec.seed, self.compute_dtype, device)

    @torch.no_grad()
    def encode(self, states: torch.Tensor) -> torch.Tensor:
        """Rows `(batch, heads, tokens, row bytes)` of states `(batch, heads, tokens, head_dim)`."""
        values = states.to(self.compute_dtype)
        if self.mean is not None:
            values = values - self.mean
        if self.spec.rotate:
            values = values @ self._rotation(states.device)
        return encode(values, self.spec.bits, grid_dtype(self.dtype))

    @torch.no_grad()
    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """States of `rows`, in the type of the states first seen."""
        values = decode(rows, self.spec.bits, self.size, grid_dtype(self.dtype), self.compute_dtype)
        if self.spec.rotate:
            values = values @ self._rotation(rows.device).mT
        if self.mean is not None:
            values = values + self.mean
        return values.to(self.dtype)

    @torch.no_grad()
    def keep_sink(self, states: torch.Tensor, start: torch.Tensor, position: int) -> None:
        """Remember those of `states`, the first at `position`, that lie in each row's sink from `start` (batch) on."""
        offset = start[:, None] + torch.arange(self.spec.sink_tokens) - position  # (B, sink), on the CPU: no waiting
        fresh = (offset >= 0) & (offset < states.shape[-2])
        if fresh.any():
            found = _take_tokens(states, offset.clamp(0, states.shape[-2] - 1))
            self.exact = torch.where(fresh[:, None, :, None].to(states.device), found, self.exact)

    @torch.no_grad()
    def restore_sink(self, states: torch.Tensor, start: torch.Tensor, position: int) -> None:
        """Overwrite the sink's share of `states`, the first at `position`, with the exact ones. Modifies `states`."""
        first = max(int(start.min()) - position, 0)
        last = min(int(start.max()) + self.spec.sink_tokens - position, states.shape[-2])
        if first >= last or self.spec.sink_tokens == 0:
            return
        offset = torch.arange(first, last) + position - start[:, None]  # (B, last - first)
        inside = ((offset >= 0) & (offset < self.spec.sink_tokens))[:, None, :, None].to(states.device)
        exact = _take_tokens(self.exact, offset.clamp(0, self.spec.sink_tokens - 1))
        states[:, :, first:last] = torch.where(inside, exact, states[:, :, first:last])


def _take_tokens(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index` (batch, n) of each row of `states` (batch, heads, tokens, head_dim)."""
    index = index.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
    return states.gather(2, index)


class FreeActCacheLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are stored in 4 or 8 bits.

    `keys` and `values` hold packed rows (`uint8`), not states; `states()` returns those.

    Args:
        spec ([`CacheSpec`]): Bits (4 or 8), rotation, sink tokens, means.
        layer_idx (`int`, *optional*, defaults to 0): Which of the means in `spec` are this layer's.
        kwargs: Of the transformers layer this one is combined with, e.g. `sliding_window`.

    Raises:
        `ValueError`: if `spec.bits` is 16, or `spec` has means but none for `layer_idx`.
    """

    def __init__(self, spec: CacheSpec, layer_idx: int = 0, **kwargs):
        super().__init__(**kwargs)
        if spec.bits not in (4, 8):
            raise ValueError(f"a quantized cache layer has 4 or 8 bits, got {spec.bits}; use DynamicLayer for 16.")
        for name, means in (("key_mean", spec.key_mean), ("value_mean", spec.value_mean)):
            if means is not None and layer_idx >= len(means):
                raise ValueError(
                    f"{name} of the CacheSpec has {len(means)} entries, there is none for layer {layer_idx}; pass one "
                    "per model layer (None for a layer without)."
                )
        self.spec, self.layer_idx = spec, layer_idx
        self.start: torch.Tensor | None = None  # (batch,) on the CPU: position of each row's first real token
        self.stores: tuple[StateStore, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over sizes, type and device of the first states."""
        super().lazy_initialization(key_states, value_states)
        means = (self.spec.key_mean, self.spec.value_mean)
        self.stores = tuple(
            StateStore(self.spec, None if mean is None else mean[self.layer_idx], states)
            for mean, states in zip(means, (key_states, value_states))
        )
        self.keys, self.values = self.keys.to(torch.uint8), self.values.to(torch.uint8)

    @property
    def awaits_start(self) -> bool:
        """Whether some row's first real token is still to come (or unknown)."""
        return self.start is None or bool((self.start >= self.get_seq_length()).any())

    def set_start(self, start: torch.Tensor) -> None:
        """Say where each row's first real token is (left padding); rows whose first token was already seen keep theirs.

        Args:
            start (`torch.Tensor` of shape `(batch,)`): Positions counted from the beginning of the cache.
        """
        start = start.to("cpu", torch.long)
        known = None if self.start is None or len(self.start) != len(start) else self.start < self.get_seq_length()
        self.start = start if known is None else torch.where(known, self.start, start)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states `(batch, heads, tokens, head_dim)`; return all that attention may see, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.start is None:
            self.start = torch.zeros(key_states.shape[0], dtype=torch.long)
        new, position = (key_states, value_states), self.get_seq_length()
        for store, states in zip(self.stores, new):
            store.keep_sink(states, self.start, position)
        rows = super().update(*(store.encode(states) for store, states in zip(self.stores, new)), *args, **kwargs)
        return tuple(self._read(*item) for item in zip(self.stores, rows, new))

    def _read(self, store: StateStore, rows: torch.Tensor, new: torch.Tensor | None = None) -> torch.Tensor:
        states = store.decode(rows)
        store.restore_sink(states, self.start, self.get_seq_length() - rows.shape[-2])
        if new is not None and new.requires_grad and torch.is_grad_enabled():
            past, current = states.split((rows.shape[-2] - new.shape[-2], new.shape[-2]), dim=-2)
            states = torch.cat((past, current + (new - new.detach())), dim=-2)
        return states

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that are cached now, dequantized, `(batch, heads, tokens, head_dim)`.

        Raises:
            `ValueError`: if nothing was cached yet.
        """
        if not self.is_initialized or self.start is None:
            raise ValueError("this cache layer holds no states yet; run the model with it first.")
        return tuple(self._read(*item) for item in zip(self.stores, (self.keys, self.values)))

    def nbytes(self) -> int:
        """Bytes held: rows and exact sink (the shared rotation and the means are not the cache's)."""
        return sum(t.nbytes for t in (self.keys, self.values, *(s.exact for s in self.stores)) if t is not None)

    def offload(self) -> None:
        """Move to the CPU."""
        super().offload()
        for store in self.stores:
            store.exact = store.exact.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move back to the device of the first states."""
        super().prefetch()
        for store in self.stores:
            store.exact = store.exact.to(self.device, non_blocking=True)

    def reset(self) -> None:
        """Forget everything; the next `update` starts afresh."""
        super().reset()
        self.start, self.stores = None, ()

    def _index_batch(self, take) -> None:
        """Apply `take`, a function of one tensor, to the batch dimension of what the base class does not know."""
        if self.start is not None:
            self.start = take(self.start)
        for store in self.stores:
            store.exact = take(store.exact)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` becomes row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        self._index_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._index_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (positions or a boolean mask)."""
        super().batch_select_indices(indices)
        self._index_batch(lambda tensor: tensor[torch.as_tensor(indices, device=tensor.device)])


class FreeActSlidingWindowLayer(FreeActCacheLayer, DynamicSlidingWindowLayer):
    """[`FreeActCacheLayer`] with the window of `DynamicSlidingWindowLayer` (Mistral, Gemma); takes `sliding_window`.

    The sink stays exact for as long as it is inside the window.
    """
