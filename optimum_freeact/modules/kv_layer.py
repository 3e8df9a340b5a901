"""Layers of a transformers cache that hold keys and values in 4 or 8 bits.

Each cached vector (one token, one head) is a row of bytes that carries its own grid (`numerics.vector_codec`), kept in
`keys` and `values` with the shape `(batch, heads, tokens, row bytes)`. Everything that transformers does to a cache
(crop, beam reordering, batch selection, offloading, sliding windows) slices or indexes the first three dimensions, so
the inherited code works on the rows as it does on the states; only what enters and leaves `update` differs.

`update` returns all cached states dequantized, those just written included: attention during prefill sees the same
error as during decoding, and logits do not depend on how a text is cut into calls. Cost: each call unpacks the whole
layer, O(tokens x heads x head_dim) on top of attention's own pass over the same states (with `rotate` times head_dim),
and holds one layer's states in the model's type for the time of its attention.

Where `kernels.kv_dispatch` finds the Triton kernels to serve (CUDA, 4 bits), they write the rows, into a buffer with room for
more, and a step of one token returns [`PackedStates`], which attention reads without unpacking.

Gradients reach the states of the current call unchanged (straight-through); cached ones are constants.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from optimum_freeact.kernels.kv_dispatch import kv_obstacle
from optimum_freeact.modules.kv_lazy import PackedStates, Pair
from optimum_freeact.modules.kv_store import PER_LAYER, CacheSpec, StateStore
from optimum_freeact.numerics.vector_codec import row_bytes


ROOM = 256  # tokens for which a buffer has room at least when it grows


class FreeActCacheLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are stored in 4 or 8 bits.

    `keys` and `values` hold packed rows (`uint8`), not states; `states()` returns those.

    Args:
        spec ([`CacheSpec`]): Bits (4 or 8), rotation, sink tokens, means.
        layer_idx (`int`, *optional*, defaults to 0): Which of the means in `spec` are this layer's.
        kwargs: Of the transformers layer this one is combined with, e.g. `sliding_window`.

    Raises:
        `ValueError`: if `spec.bits` is 16, or `spec` has entries per layer but none for `layer_idx`.
    """

    def __init__(self, spec: CacheSpec, layer_idx: int = 0, **kwargs):
        super().__init__(**kwargs)
        if spec.bits not in (4, 8):
            raise ValueError(f"a quantized cache layer has 4 or 8 bits, got {spec.bits}; use DynamicLayer for 16.")
        for name in PER_LAYER:
            entries = getattr(spec, name)
            if entries is not None and layer_idx >= len(entries):
                raise ValueError(
                    f"{name} of the CacheSpec has {len(entries)} entries, there is none for layer {layer_idx}; pass "
                    "one per model layer (None for a layer without)."
                )
        self.spec, self.layer_idx = spec, layer_idx
        self.keys: torch.Tensor
        self.values: torch.Tensor
        self.start: torch.Tensor | None = None  # (batch,) on the CPU: position of each row's first real token
        self.stores: tuple[StateStore, ...] = ()
        self.obstacle: str | None = "no states yet"  # why no kernel serves
        self._buffers: dict[str, torch.Tensor] = {}
        self._start_there: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over sizes, type and device of the first states."""
        super().lazy_initialization(key_states, value_states)
        key_mean, key_frequencies, value_mean = (
            None if entries is None else entries[self.layer_idx]
            for entries in (getattr(self.spec, name) for name in PER_LAYER)
        )
        self.stores = (
            StateStore(self.spec, key_states, key_mean, key_frequencies),
            StateStore(self.spec, value_states, value_mean),
        )
        self.keys, self.values = self.keys.to(torch.uint8), self.values.to(torch.uint8)
        sizes = {states.shape[-1] for states in (key_states, value_states)}
        self.obstacle = "keys and values of different sizes" if len(sizes) > 1 else None
        self.obstacle = self.obstacle or kv_obstacle(
            key_states.device, self.spec.bits, key_states.dtype, sizes.pop(), self.spec.rotate
        )

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
        return self._update(torch.compiler.is_compiling(), key_states, value_states, *args, **kwargs)

    @torch.compiler.disable  # rows of a text that grows, and tables that all calls share: compiled, each call would make them anew
    def _update(
        self, unpacked: bool, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor | PackedStates, torch.Tensor | PackedStates]:
        """[`update`]; all states are `unpacked` for compiled attention, which cannot read them otherwise."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.start is None:
            self.start = torch.zeros(key_states.shape[0], dtype=torch.long)
        new, position = (key_states, value_states), self.get_seq_length()
        for store, states in zip(self.stores, new):
            store.keep_sink(states, self.start, position)
        if self.obstacle is None:
            return self._update_packed(new, self.start, position, unpacked)
        rows = (store.encode(states, self.start, position) for store, states in zip(self.stores, new))
        keys, values = (self._read(*item) for item in zip(self.stores, super().update(*rows, *args, **kwargs), new))
        return keys, values

    def _update_packed(
        self, new: tuple[torch.Tensor, torch.Tensor], first: torch.Tensor, position: int, unpacked: bool
    ) -> tuple[torch.Tensor | PackedStates, torch.Tensor | PackedStates]:
        """[`update`] by kernels: rows are written in place, and a single token's attention is left to read them, or all is `unpacked`."""
        from optimum_freeact.kernels.kv_write_triton import write_rows

        if self._start_there is None or self._start_there[0] is not first:
            self._start_there = (first, first.to(new[0].device, torch.int32))
        start, end = self._start_there[1], position + new[0].shape[-2]
        for name, store, states in zip(("keys", "values"), self.stores, new):
            buffer = self._room(name, states, end)
            with torch.no_grad():
                write_rows(states.detach(), store.packed(None, end), start, position, buffer[:, :, position:end])
            setattr(self, name, buffer[:, :, :end])
        rows = (self.keys, self.values)
        if (
            unpacked
            or new[0].shape[-2] > 1
            or (torch.is_grad_enabled() and any(states.requires_grad for states in new))
        ):
            keys, values = (self._read(*item) for item in zip(self.stores, rows, new))
            return keys, values
        pair = Pair(start)
        keys, values = (
            PackedStates(store.packed(data, end), pair, store.size, store.dtype, partial(self._read, store, data))
            for store, data in zip(self.stores, rows)
        )
        return keys, values

    def _room(self, name: str, states: torch.Tensor, end: int) -> torch.Tensor:
        """The buffer behind `keys` or `values`, with room for `end` tokens."""
        current, buffer = getattr(self, name), self._buffers.get(name)
        held = current.shape[2] if current.dim() == 4 else 0
        mine = buffer is not None and (
            held == 0
            or (
                current.data_ptr() == buffer.data_ptr()
                and current.stride() == buffer.stride()
                and current.shape[:2] == buffer.shape[:2]
            )
        )
        if buffer is None or not mine or buffer.shape[:2] != states.shape[:2] or buffer.shape[2] < end:
            room = end + max(ROOM, end // 8)
            shape = (*states.shape[:2], room, row_bytes(states.shape[-1], self.spec.bits))
            buffer = torch.empty(shape, dtype=torch.uint8, device=states.device)
            if held:
                buffer[:, :, :held] = current
            self._buffers[name] = buffer
        return buffer

    def _read(self, store: StateStore, rows: torch.Tensor, new: torch.Tensor | None = None) -> torch.Tensor:
        states = store.decode(rows, self.start, self.get_seq_length() - rows.shape[-2])
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
        self._buffers, self._start_there = {}, None
        for store in self.stores:
            store.exact = store.exact.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move back to the device of the first states.

        The cache calls it on a stream of its own, which must wait until the copies to the CPU have ended; and what it brings
        is read on the default stream, so its memory must not be used again before that has come so far. Neither is left to
        the host: transformers 5.17 sees to neither.
        """
        default = (
            torch.cuda.default_stream(self.device) if self.is_initialized and self.device.type == "cuda" else None
        )
        if default is not None:
            torch.cuda.current_stream(self.device).wait_stream(default)
        super().prefetch()
        for store in self.stores:
            store.exact = store.exact.to(self.device, non_blocking=True)
        if default is not None:
            for tensor in (self.keys, self.values, *(store.exact for store in self.stores)):
                tensor.record_stream(default)

    def reset(self) -> None:
        """Forget everything; the next `update` starts afresh."""
        super().reset()
        self.start, self.stores, self._buffers, self._start_there = None, (), {}, None

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

    The sink stays exact for as long as it is inside the window. Read by torch.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As the other's; no kernel serves."""
        super().lazy_initialization(key_states, value_states)
        self.obstacle = "a sliding window: the kernels read whole texts"
