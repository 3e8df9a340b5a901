"""Calibration inputs as a processor makes them: dictionaries with `input_ids` and whatever else the model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def is_prepared(items: Any) -> bool:
    """Whether a list holds dictionaries (or a processor's outputs) with `input_ids`."""
    return (
        isinstance(items, (list, tuple))
        and bool(items)
        and all(isinstance(i, Mapping) and "input_ids" in i for i in items)
    )


def read_prepared(items: list, n_samples: int) -> list[dict]:
    """The items as dictionaries of tensors with a batch dimension.

    Args:
        items: Each a mapping with `input_ids` of shape `(batch, length)` or `(length,)`, and other arguments of the model.
        n_samples (`int`): How many are wanted.

    Raises:
        `ValueError`: for ids of another shape, or too few items.
    """
    if len(items) < n_samples:
        raise ValueError(
            f"Calibration needs n_samples={n_samples} inputs, got {len(items)}: give more, or lower n_samples."
        )
    found = []
    for item in items:
        inputs = {name: value for name, value in dict(item).items() if value is not None}
        ids = torch.as_tensor(inputs["input_ids"])
        if ids.ndim == 1:  # one sequence without a batch dimension: those arguments that run along it get one too
            inputs = {
                name: torch.as_tensor(value)[None]
                if name == "input_ids" or getattr(value, "shape", (0,))[:1] == ids.shape
                else value
                for name, value in inputs.items()
            }
            ids = inputs["input_ids"]
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise ValueError(
                f"input_ids of a calibration input must be integers of shape (batch, length), got {ids.dtype} of "
                f"{tuple(ids.shape)}."
            )
        found.append({**inputs, "input_ids": ids})
    return found


def choose(items: list[dict], n_samples: int, seed: int, vocab_size: int | None) -> list[dict]:
    """`n_samples` of the items, at random, in their order."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:n_samples].sort().values
    chosen = [items[i] for i in order.tolist()]
    for item in chosen:
        ids = item["input_ids"]
        if vocab_size is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"Calibration ids must lie in [0, {vocab_size}), got {int(ids.min())}..{int(ids.max())}.")
    return chosen


def batches(samples: torch.Tensor | list[dict], batch_size: int) -> list[dict]:
    """Arguments of the model, one dictionary a forward; prepared inputs differ in shape and run one by one."""
    if isinstance(samples, torch.Tensor):
        return [{"input_ids": ids} for ids in samples.split(batch_size)]
    return samples


def digest(samples: torch.Tensor | list[dict]) -> bytes:
    """Bytes that tell two sets of samples apart."""
    if isinstance(samples, torch.Tensor):
        return samples.cpu().contiguous().numpy().tobytes()
    tensors = [value for item in samples for _, value in sorted(item.items()) if isinstance(value, torch.Tensor)]
    return b"".join(
        value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for value in tensors
    )


def size_of(samples: torch.Tensor | list[dict]) -> tuple[int, int]:
    """Number of sequences, and the length of the longest."""
    if isinstance(samples, torch.Tensor):
        return tuple(samples.shape)
    return sum(len(i["input_ids"]) for i in samples), max(i["input_ids"].shape[1] for i in samples)
