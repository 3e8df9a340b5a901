"""How quantized modules behave when they are copied, cast, pickled or compiled."""

from __future__ import annotations

import copy

import torch
from torch import nn


PICKLE_REFUSED = (
    "{} is not pickled: a pickle can run code when it is read and ties the file to this version of the class. "
    "Save the model with model.save_pretrained(folder) and load it with from_pretrained(folder)."
)


def keep_dtypes(module: nn.Module, apply, fn, recurse: bool) -> nn.Module:
    """Run `nn.Module._apply` but undo casts: `.to(dtype)` or `.half()` moves the module and keeps its own dtypes."""
    before = {name: tensor.dtype for name, tensor in module._buffers.items() if tensor is not None}
    stored = {name: tensor for name, tensor in module._buffers.items() if tensor is not None}
    result = apply(fn, recurse)
    for name, dtype in before.items():
        tensor = module._buffers[name]
        if tensor.dtype != dtype:
            module._buffers[name] = stored[name].to(device=tensor.device)
    return result


def deepcopy_module(module: nn.Module, memo: dict) -> nn.Module:
    """Deep copy of a module that refuses pickling (the default goes through `__reduce_ex__`)."""
    clone = module.__class__.__new__(module.__class__)
    memo[id(module)] = clone
    clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in module.__dict__.items()})
    return clone


def keep_in_place(*tensors: torch.Tensor | None) -> None:
    """Tell `torch.compile` that tensors on a GPU stay where they are: a CUDA graph would else copy them in each call."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            torch._dynamo.mark_static_address(tensor, guard=True)
