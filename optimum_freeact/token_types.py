"""Who is what: the type of every token of the current forward, known to every quantized linear.

Type 0 is ordinary text and the default wherever nothing else is known. The attention sink is the first real token of
each sequence: it carries massive activations, and every later token attends to it, so its statistics must not be
mixed with the others'.

The types of a forward are written to a [`TypeState`] by a hook on the decoder, and read by the modules inside. They
stay until the next forward, because gradient checkpointing recomputes blocks later.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn


TEXT = "text"
SINK = "sink"


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


def _past_length(arguments: dict[str, Any]) -> int | torch.Tensor:
    cache = arguments.get("past_key_values")
    return cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0


def sink_mask(arguments: dict[str, Any]) -> torch.Tensor | None:
    """Which of the current tokens are the first real token of their sequence.

    Correct for left and right padding (through a 2-D `attention_mask`), packed sequences (through `position_ids` that
    start again at 0, with or without a mask), and cached decoding (no new token is first).

    Args:
        arguments (`dict`): The decoder's keyword arguments: `input_ids` or `inputs_embeds`, and where present
            `attention_mask`, `position_ids`, `past_key_values`.

    Returns:
        `torch.Tensor` (`bool`) of shape `(batch, sequence)`, or `None` when neither ids nor embeddings are given.
    """
    given = arguments.get("input_ids")
    given = arguments.get("inputs_embeds") if given is None else given
    if given is None:
        return None
    batch, length = given.shape[:2]
    mask = arguments.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[-1] >= length else None
    positions = arguments.get("position_ids")
    positions = positions if isinstance(positions, torch.Tensor) and positions.ndim == 2 else None
    restarts = None if positions is None else (positions == 0).expand(batch, length)
    if mask is not None:
        real = mask != 0
        first = ((real.cumsum(-1) == 1) & real)[:, -length:]
        return first if restarts is None else first | (restarts & real[:, -length:])
    if restarts is not None:
        return restarts
    index = torch.arange(length, device=given.device) + _past_length(arguments)
    return (index == 0).expand(batch, length)


class TokenTyper:
    """Types from a decoder's arguments.

    Args:
        names (`list[str]`): Names of the types; index = type. `"text"` must be first; `"sink"` may follow.
    """

    def __init__(self, names: list[str]):
        if not names or names[0] != TEXT or set(names) - {TEXT, SINK}:
            raise ValueError(f"token_types must be ['text'] or ['text', 'sink'], got {names}.")
        self.names = list(names)

    def __call__(self, arguments: dict[str, Any]) -> torch.Tensor | None:
        """Types of shape `(batch, sequence)`, `int64`, or `None` when there is only one type or nothing is known."""
        if SINK not in self.names:
            return None
        first = sink_mask(arguments)
        return None if first is None else first.long() * self.names.index(SINK)


class _TyperHook:
    """The pre-hook; an object, so that it is copied together with its module and state."""

    def __init__(self, typer: TokenTyper, state: TypeState):
        self.typer, self.state = typer, state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if args:
            kwargs = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        self.state.types = self.typer(kwargs)


def install_typer(decoder: nn.Module, typer: TokenTyper, state: TypeState) -> torch.utils.hooks.RemovableHandle:
    """Make every forward of `decoder` write its tokens' types to `state`; returns the hook's handle."""
    return decoder.register_forward_pre_hook(_TyperHook(typer, state), with_kwargs=True)
