"""Who is what: the type of every token of the current forward, known to every quantized linear.

Type 0 is ordinary text and the default wherever nothing else is known. The attention sink is the first real token of
each sequence: it carries massive activations, and every later token attends to it, so its statistics must not be
mixed with the others'.

The types of a forward are written to a [`TypeState`] by a hook on the decoder, and read by the modules inside. They
stay until the next forward, because gradient checkpointing recomputes blocks later.
"""

from __future__ import annotations

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

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        """Types that fit the rows of `x`: same leading shape, or the same number of rows when tokens were flattened."""
        types = self.types
        if types is None:
            return None
        if x.shape[:-1] == types.shape:
            return types
        return types.reshape(x.shape[:-1]) if x.shape[:-1].numel() == types.numel() else None


def _past_length(arguments: dict[str, Any]) -> int | torch.Tensor:
    cache = arguments.get("past_key_values")
    return cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0


def sink_mask(arguments: dict[str, Any]) -> torch.Tensor | None:
    """Which of the current tokens are the first real token of their sequence.

    Correct for left and right padding (through a 2-D `attention_mask`), packed sequences (through `position_ids` that
    start again at 0), and cached decoding (no new token is first).

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
    mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    positions = arguments.get("position_ids")
    if mask is not None:
        first = (mask.cumsum(-1) == 1) & (mask == 1)
        first = first[:, -length:] if mask.shape[-1] >= length else None
    else:
        index = torch.arange(length, device=given.device) + _past_length(arguments)
        first = (index == 0).expand(batch, length)
    if first is None or (isinstance(positions, torch.Tensor) and positions.ndim == 2 and mask is None):
        first = (positions == 0).expand(batch, length)
    return first


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


def install_typer(decoder: nn.Module, typer: TokenTyper, state: TypeState) -> torch.utils.hooks.RemovableHandle:
    """Make every forward of `decoder` write its tokens' types to `state`; returns the hook's handle."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:  # noqa: ARG001
        arguments = dict(kwargs)
        if args:
            arguments.setdefault("input_ids", args[0])
        state.types = typer(arguments)

    return decoder.register_forward_pre_hook(hook, with_kwargs=True)
