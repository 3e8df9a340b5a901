"""The types of the current forward: written by a hook on the decoder, read by every quantized linear inside.

They stay until the next forward, because gradient checkpointing recomputes blocks later.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn


class Seen(NamedTuple):
    """What a module's arguments tell: types by rules and the sinks, each `(batch, sequence)` or `None`."""

    marks: torch.Tensor | None
    first: torch.Tensor | None


class TypeState:
    """The current types, `(batch, sequence)` integers or `None`. One per model; each thread sees its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def types(self) -> torch.Tensor | None:
        """Types of the current forward."""
        return getattr(self._local, "types", None)

    @types.setter
    def types(self, value: torch.Tensor | None) -> None:
        self._local.types = value

    def note(self, seen: Seen | None) -> None:
        """Keep what a module around the decoder saw, for the decoder's own hook."""
        self._local.seen = seen

    def take(self) -> Seen | None:
        """What was noted since the last forward of the decoder."""
        seen = getattr(self._local, "seen", None)
        self._local.seen = None
        return seen

    @property
    def given(self) -> torch.Tensor | None:
        """Types that the user said (see [`given_types`])."""
        return getattr(self._local, "given", None)

    @given.setter
    def given(self, value: torch.Tensor | None) -> None:
        self._local.given = value

    def __deepcopy__(self, memo: dict) -> TypeState:
        copy = TypeState()
        memo[id(self)] = copy
        return copy

    def __reduce__(self) -> tuple:
        return TypeState, ()  # types belong to a forward, not to the model: a copy starts without

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        """Types that fit the rows of `x`: same leading shape, or the same number of rows when tokens were flattened."""
        types = self.types
        if types is None:
            return None
        if x.shape[:-1] == types.shape:
            return types
        return types.reshape(x.shape[:-1]) if x.shape[:-1].numel() == types.numel() else None


def attach_state(model: nn.Module) -> TypeState:
    """The model's [`TypeState`], made on first use."""
    if "_freeact_state" not in model.__dict__:
        model.__dict__["_freeact_state"] = TypeState()
    return model.__dict__["_freeact_state"]


@contextmanager
def given_types(model: nn.Module, types: torch.Tensor) -> Iterator[None]:
    """Say the types of the forwards inside the `with`, where the model cannot know them (embeddings without ids).

    Args:
        model: A quantized model.
        types (`torch.Tensor` of shape `(batch, sequence)`): Integers, the position in the config's `token_types`; the
            sink is found in any case.
    """
    state = attach_state(model)
    before, state.given = state.given, types
    try:
        yield
    finally:
        state.given = before
