"""What each decoder block is called with, taken from the model itself.

One cheap forward per batch runs everything around the blocks (embeddings, masks, rotary tables) while the blocks only
note their arguments and pass the hidden states on. So every architecture's own masks and position embeddings are used,
per block (sliding and full attention differ), without knowing any of them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimum_freeact.cache_name import NAMES
from optimum_freeact.calibration.prepared import batches as split_batches
from optimum_freeact.type_state import TypeState


class _Stop(Exception):  # noqa: N818
    """Raised in the last block: what follows it is not needed."""


@dataclass
class Batch:
    """One calibration batch.

    Args:
        hidden (`torch.Tensor` of shape `(batch, sequence, d)`): Input of the first block.
        types (`torch.Tensor` of shape `(batch, sequence)`, *optional*): Token types.
        calls (`list[tuple[tuple, dict]]`): Further positional and keyword arguments, per block.
        padding (`torch.Tensor` of shape `(batch, sequence)`, *optional*): Tokens that are no tokens: they run along, and no
            statistics are taken of them.
    """

    hidden: torch.Tensor
    types: torch.Tensor | None
    calls: list[tuple[tuple, dict]]
    padding: torch.Tensor | None = None


@contextmanager
def _recording(blocks: nn.ModuleList, calls: list[tuple[tuple, dict]], first: list[torch.Tensor], lengths: list[int]):
    """Replace each block's forward by one that notes its arguments; the originals come back in any case.

    What it returns has as many items as the block's own output: `lengths`, 0 for a tensor alone.
    """

    def record(index: int):
        def forward(*args, **kwargs):
            kwargs = {k: v for k, v in kwargs.items() if k not in NAMES and "past_key_value" not in k}
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                first.append(hidden)
            kwargs.pop("hidden_states", None)
            calls.append((args[1:], kwargs))
            if index == len(blocks) - 1:
                raise _Stop
            return (hidden, *[None] * (lengths[index] - 1)) if lengths[index] else hidden

        return forward

    for index, block in enumerate(blocks):
        block.forward = record(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def output_lengths(model: nn.Module, blocks: nn.ModuleList, inputs: dict) -> list[int]:
    """How many items each block returns, from one forward of the whole model; 0 for a tensor that is no tuple."""
    lengths = [0] * len(blocks)

    def note(index: int):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG001
            lengths[index] = len(output) if isinstance(output, tuple) else 0

        return hook

    handles = [block.register_forward_hook(note(index)) for index, block in enumerate(blocks)]
    few = {"input_ids": inputs["input_ids"][:1, :8]} if set(inputs) == {"input_ids"} else inputs
    try:
        model(**few, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return lengths


@torch.no_grad()
def capture(
    model: nn.Module, blocks: nn.ModuleList, samples: torch.Tensor | list[dict], batch_size: int, state: TypeState
) -> list[Batch]:
    """Arguments of all blocks for all batches; hidden states are those before the first block.

    Args:
        model: Any transformers decoder that takes `input_ids`.
        blocks: Its decoder blocks.
        samples (`torch.Tensor` of shape `(n, length)`, or `list[dict]`): Token ids, or the model's arguments.
        batch_size (`int`): Samples a batch.
        state ([`TypeState`]): Read after each forward's typing hook has run.
    """
    device = next(model.parameters()).device
    batches: list[Batch] = []
    lengths = [0] * len(blocks)  # nearly every model's blocks return a tensor
    for inputs in split_batches(samples, batch_size):
        inputs = to_device(inputs, device)
        calls, first = _calls(model, blocks, inputs, lengths)
        if len(calls) < len(blocks) and not batches:
            lengths = output_lengths(model, blocks, inputs)
            calls, first = _calls(model, blocks, inputs, lengths)
        if len(calls) != len(blocks):
            raise ValueError(
                f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks once each: blocks that are "
                "skipped, repeated or called out of order cannot be calibrated one by one."
            )
        mask = inputs.get("attention_mask")
        padded = isinstance(mask, torch.Tensor) and mask.shape == first[0].shape[:2] and not bool((mask != 0).all())
        batches.append(Batch(first[0], state.types, calls, mask == 0 if padded else None))
    return batches


def _calls(model: nn.Module, blocks: nn.ModuleList, inputs: dict, lengths: list[int]) -> tuple[list, list]:
    """What the blocks are called with, and the first one's hidden states; fewer calls where the output does not fit."""
    calls: list[tuple[tuple, dict]] = []
    first: list[torch.Tensor] = []
    with _recording(blocks, calls, first, lengths):
        try:
            model(**inputs, use_cache=False)
        except _Stop:
            pass
        except (TypeError, ValueError):
            if not calls or any(lengths):  # it is not what a block returned that was wrong
                raise
    return calls, first


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return {k: to_device(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def run_block(block: nn.Module, hidden: torch.Tensor, call: tuple[tuple, dict], device: torch.device) -> torch.Tensor:
    """Output hidden states of a block for one batch."""
    args, kwargs = to_device(call, device)
    output = block(hidden.to(device), *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output
