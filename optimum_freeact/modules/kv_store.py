"""How cached keys and values become rows of bytes: the options, and one store for each kind of states of a layer.

Before rounding a mean may be subtracted and a rotation applied; both are undone after. The states of the attention
sink are kept beside the rows in the model's own type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from optimum_freeact.kernels.kv_reference import CacheRows
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.vector_codec import decode, encode, grid_dtype


PER_LAYER = ("key_mean", "key_frequencies", "value_mean")  # the options that have one entry per model layer


@dataclass(frozen=True, eq=False)
class CacheSpec:
    """How to store keys and values.

    Args:
        bits (`int`, *optional*, defaults to 4): 4, 8, or 16 for the model's own cache, left as it is.
        rotate (`bool`, *optional*, defaults to `False`):
            Rotate each vector, less its mean, by a random Hadamard matrix before rounding and back after. Exact without
            rounding.
        sink_tokens (`int`, *optional*, defaults to 1):
            Number of positions, from the first real token of each row on, kept in the model's type. The first token
            is the attention sink: its keys and values are unlike all others and every later token reads them.
        key_mean (sequence of `torch.Tensor` of shape `(key_value_heads, head_dim)`, *optional*):
            One per model layer (`None` entries are skipped): subtracted before rounding and added back after.
        key_frequencies (sequence of `torch.Tensor` of shape `(n,)`, `2 n <= head_dim`, *optional*):
            One per model layer: rotary frequencies. `key_mean` is then that of keys *before* the rotary embedding, and
            is turned by each token's position. Biased keys need it (nats lost by Qwen2.5-0.5B with 4 bits, 1k tokens of
            the Debian handbook: 0.74 without means, 0.22 with the means of the keys as cached, 0.02 with this).
            Exact whatever the frequencies are: wrong ones only widen the grids.
        value_mean (sequence of `torch.Tensor` of shape `(key_value_heads, head_dim)`, *optional*):
            The same for values.
        seed (`int`, *optional*, defaults to 0): Of the rotation.

    Raises:
        `ValueError`: if `bits` or `sink_tokens` is not allowed, or frequencies come without a mean.
    """

    bits: int = 4
    rotate: bool = False
    sink_tokens: int = 1
    key_mean: Sequence[torch.Tensor | None] | None = None
    key_frequencies: Sequence[torch.Tensor | None] | None = None
    value_mean: Sequence[torch.Tensor | None] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.bits not in (4, 8, 16):
            raise ValueError(f"bits of the KV cache must be 4, 8 or 16, got {self.bits!r}; 16 leaves it unquantized.")
        if not isinstance(self.sink_tokens, int) or self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be an integer of at least 0, got {self.sink_tokens!r}; 0 keeps none.")
        if self.key_frequencies is not None and self.key_mean is None:
            raise ValueError("key_frequencies say how key_mean turns, but key_mean is None; pass both or neither.")


@lru_cache(maxsize=32)
def _rotation(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One rotation of `size`, shared by all layers of all caches; never modified."""
    with torch.inference_mode(False):  # it outlives the caller's inference mode
        return flat_rotation(size, torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


@lru_cache(maxsize=8)
def _turns(
    frequencies: tuple[float, ...], length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of all rotary angles, `(length, n)`; shared by the layers of all caches, never modified."""
    with torch.inference_mode(False):
        angles = torch.arange(length).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
        return tuple(table.to(device=device, dtype=dtype) for table in (angles.cos(), angles.sin()))


class StateStore:
    """One kind of states (keys or values) of one layer: rows in and out, and the exact states of the sink.

    Args:
        spec ([`CacheSpec`]): Bits, rotation, number of sink tokens.
        states (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): Sets sizes, type and device; not stored.
        mean (`torch.Tensor` of shape `(heads, head_dim)`, *optional*): Subtracted before rounding, added back after.
        frequencies (`torch.Tensor` of shape `(n,)`, *optional*): Rotary frequencies by which `mean` turns.

    Raises:
        `ValueError`: if `mean` or `frequencies` do not fit the states.
    """

    def __init__(
        self,
        spec: CacheSpec,
        states: torch.Tensor,
        mean: torch.Tensor | None = None,
        frequencies: torch.Tensor | None = None,
    ):
        batch, heads, _, self.size = states.shape
        self.spec, self.dtype = spec, states.dtype
        self.compute_dtype = torch.promote_types(states.dtype, torch.float32)
        if mean is not None and mean.shape != (heads, self.size):
            raise ValueError(
                f"the mean of a KV cache has shape {tuple(mean.shape)}, the states have {heads} heads of {self.size}; "
                f"pass one of shape {(heads, self.size)} per model layer."
            )
        if frequencies is not None and 2 * frequencies.numel() > self.size:
            raise ValueError(
                f"{frequencies.numel()} rotary frequencies do not fit a head_dim of {self.size}; pass at most half as many."
            )
        # (heads, 1, head_dim)
        self.mean = None if mean is None else mean.to(states.device, self.compute_dtype)[:, None, :]
        self.frequencies = None if frequencies is None else tuple(frequencies.flatten().tolist())
        self.exact = states.new_zeros(batch, heads, spec.sink_tokens, self.size)

    def _rotation(self, device: torch.device) -> torch.Tensor:
        return _rotation(self.size, self.spec.seed, self.compute_dtype, device)

    def rotation(self, device: torch.device) -> torch.Tensor | None:
        """By what rows are rotated, `None` without."""
        return self._rotation(device) if self.spec.rotate else None

    def packed(self, data: torch.Tensor | None, length: int) -> CacheRows:
        """`data`, all rows of a cache of `length` tokens, as kernels read them."""
        exact = self.exact if self.spec.sink_tokens else None
        rows = CacheRows(data, grid_dtype(self.dtype), exact=exact, rotation=self.rotation(self.exact.device))
        if self.mean is not None:
            rows.mean = self.mean[:, 0].contiguous()
            if self.frequencies is not None:
                table = 1 << max(length - 1, 255).bit_length()  # a block of angles at least
                rows.cos, rows.sin = _turns(self.frequencies, table, self.compute_dtype, self.mean.device)
        return rows

    def _offset(self, mean: torch.Tensor, tokens: int, start: torch.Tensor, position: int) -> torch.Tensor:
        """The mean at `tokens` cache positions from `position` on, broadcastable to `(batch, heads, tokens, head_dim)`."""
        if self.frequencies is None:
            return mean
        start = start[:1] if (start == start[0]).all() else start
        turn = (torch.arange(tokens) + position - start[:, None]).clamp_min(0)  # (B or 1, tokens); padding: any
        length = 1 << max(position + tokens - 1, 1).bit_length()
        tables = _turns(self.frequencies, length, self.compute_dtype, mean.device)
        cos, sin = (table[turn.to(table.device)][:, None] for table in tables)  # (B or 1, 1, tokens, n)
        n = len(self.frequencies)
        first, second, rest = mean.split((n, n, self.size - 2 * n), dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat((*turned, rest.expand(*turned[0].shape[:-1], -1)), dim=-1)

    @torch.no_grad()
    def encode(self, states: torch.Tensor, start: torch.Tensor, position: int) -> torch.Tensor:
        """Rows of states.

        Args:
            states (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): New states.
            start (`torch.Tensor` of shape `(batch,)`): Position of each row's first real token, on the CPU.
            position (`int`): Position of the first of `states` in the cache.

        Returns:
            `torch.Tensor` (`uint8`) of shape `(batch, heads, tokens, row bytes)`.
        """
        values = states.to(self.compute_dtype)
        if self.mean is not None:
            values = values - self._offset(self.mean, states.shape[-2], start, position)
        if self.spec.rotate:
            values = values @ self._rotation(states.device)
        return encode(values, self.spec.bits, grid_dtype(self.dtype))

    @torch.no_grad()
    def decode(self, rows: torch.Tensor, start: torch.Tensor, position: int) -> torch.Tensor:
        """States of `rows`, in the type of the states first seen, those of the sink exact; arguments as [`encode`]."""
        values = decode(rows, self.spec.bits, self.size, grid_dtype(self.dtype), self.compute_dtype)
        if self.spec.rotate:
            values = values @ self._rotation(rows.device).mT
        if self.mean is not None:
            values = values + self._offset(self.mean, rows.shape[-2], start, position)
        states = values.to(self.dtype)
        self._restore_sink(states, start, position)
        return states

    @torch.no_grad()
    def keep_sink(self, states: torch.Tensor, start: torch.Tensor, position: int) -> None:
        """Remember those of `states`, the first at `position`, that lie in each row's sink from `start` (batch) on."""
        offset = start[:, None] + torch.arange(self.spec.sink_tokens) - position  # (B, sink), on the CPU: no waiting
        fresh = (offset >= 0) & (offset < states.shape[-2])
        if fresh.any():
            found = _take_tokens(states, offset.clamp(0, states.shape[-2] - 1))
            self.exact = torch.where(fresh[:, None, :, None].to(states.device), found, self.exact)

    def _restore_sink(self, states: torch.Tensor, start: torch.Tensor, position: int) -> None:
        """Overwrite the sink's share of `states`, the first at `position`, with the exact ones. Modifies `states`."""
        first = max(int(start.min()) - position, 0)
        last = min(int(start.max()) + self.spec.sink_tokens - position, states.shape[-2])
        if first >= last or self.spec.sink_tokens == 0:
            return
        offset = torch.arange(first, last) + position - start[:, None]  # (B, last - first)
        inside = ((offset >= 0) & (offset < self.spec.sink_tokens))[:, None, :, None].to(states.device)
        exact = _take_tokens(self.exact, offset.clamp(0, self.spec.sink_tokens - 1)).to(
            states.device
        )  # may be offloaded
        states[:, :, first:last] = torch.where(inside, exact, states[:, :, first:last])


def _take_tokens(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `index` (batch, n) of each row of `states` (batch, heads, tokens, head_dim)."""
    index = index.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
    return states.gather(2, index)
