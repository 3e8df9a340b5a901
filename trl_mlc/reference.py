"""A reference model that FSDP2 shards must have its weights on every process first.

With accelerate's `fsdp_cpu_ram_efficient_loading` (its default) only the first process reads weights; the others make empty
tensors. accelerate sends the trained model's weights around, and TRL (1.16) shards a reference model from what each
process has: then all shards but the first process's are whatever was in memory.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


SHARDS = "prepare_fsdp"  # what TRL's trainers call it by


@contextmanager
def whole_reference(trainer: type) -> Iterator[None]:
    """While a trainer of this class is made, let a reference model get the first process's weights before it is sharded.

    Nothing changes without FSDP2, on one process, and where every process reads weights.

    Args:
        trainer (`type`): its bases are searched for the module that shards.
    """
    modules = [sys.modules[base.__module__] for base in trainer.__mro__]
    found = next((module for module in modules if hasattr(module, SHARDS)), None)
    if found is None:
        yield
        return
    original = getattr(found, SHARDS)

    @functools.wraps(original)
    def prepare(model, accelerator, *args, **kwargs):
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.cpu_ram_efficient_loading:
            send_from_first(model, accelerator.device)
        return original(model, accelerator, *args, **kwargs)

    setattr(found, SHARDS, prepare)
    try:
        yield
    finally:
        setattr(found, SHARDS, original)


@torch.no_grad()
def send_from_first(model: nn.Module, device: torch.device) -> None:
    """Give all processes the first one's parameters and buffers, one tensor at a time by way of `device`."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    for tensor in chain(model.parameters(), model.buffers()):
        whole = tensor.detach().to(device)
        torch.distributed.broadcast(whole, src=0)
        tensor.copy_(whole)
