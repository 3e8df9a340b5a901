"""How many bytes of a model are quantized, how many are not, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.embeddings import FreeActEmbedding, FreeActHead
from optimum_freeact.modules.experts import FreeActExperts
from optimum_freeact.modules.layout import find_blocks, unquantized_parameters
from optimum_freeact.modules.linear import FreeActLinear


UNITS = ("B", "kB", "MB", "GB", "TB")


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all tensors; those on the meta device count as if they were there."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class QuantizedSize:
    """The quantized linears of a model.

    Args:
        n_linears, n_inputs (`int`): Quantized linears, those of experts one by one, and the inputs that they share.
        n_weights (`int`): Numbers in their original weight matrices.
        stored_bytes (`int`): Everything stored for them: codes, scales, biases, means and transforms.
        bf16_bytes (`int`): Two bytes for each original weight; original biases are not counted.
    """

    n_linears: int
    n_inputs: int
    n_weights: int
    stored_bytes: int
    bf16_bytes: int

    @property
    def ratio(self) -> float:
        """Stored bytes over those of the weights in bfloat16."""
        return self.stored_bytes / self.bf16_bytes if self.bf16_bytes else 1.0


def quantized_size(model: nn.Module) -> QuantizedSize:
    """Bytes of the quantized linears and their inputs, as saved."""
    linears = [module for module in model.modules() if isinstance(module, FreeActLinear)]
    inputs: list = [module for module in model.modules() if isinstance(module, FreeActInput)]
    weights = sum(module.in_features * module.out_features for module in linears)
    stored = sum(tensor_bytes(module.state_dict().values()) for module in (*linears, *inputs))
    experts = [module for module in model.modules() if isinstance(module, FreeActExperts)]
    weights += sum(module.num_experts * m * d for module in experts for m, d in module.shapes)
    stored += sum(tensor_bytes(module.own_tensors().values()) for module in experts)
    n_linears = len(linears) + sum(2 * module.num_experts for module in experts)
    return QuantizedSize(n_linears, len(inputs), weights, stored, 2 * weights)


@dataclass(frozen=True)
class Rest:
    """Tensors that are not quantized to the model's bits, all for one reason; `name` has `*` for the block's number."""

    name: str
    n_tensors: int
    n_bytes: int
    why: str


def unquantized(model: nn.Module, planned: Iterable[str] = ()) -> list[Rest]:
    """What is not quantized and why, blocks of a kind together, the largest first.

    Args:
        model: A model, quantized or not; the meta device will do.
        planned (`Iterable[str]`, *optional*): Modules whose parameters are left out, because they would be quantized.
    """
    reasons = unquantized_parameters(model, *find_blocks(model))
    inside = tuple(f"{name}." for name in planned)
    found: dict[tuple[str, str], list[int]] = {}
    quantized = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, (FreeActLinear, FreeActInput, FreeActExperts))
        for tensor in module.parameters(recurse=False)
    }
    kinds = (FreeActEmbedding, FreeActHead)
    in_bytes = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    for name, parameter in model.named_parameters():
        if id(parameter) in quantized or (inside and name.startswith(inside)):
            continue
        if id(parameter) in in_bytes:
            key = (name, "embeddings and head: one byte a number (embedding_bits=8)")
        elif name in reasons:
            key = (re.sub(r"\.\d+\.", ".*.", name), reasons[name])
        else:
            key = ("norms and biases", "vectors: they hold next to nothing")
        found.setdefault(key, []).append(tensor_bytes([parameter]))
    rests = [Rest(name, len(sizes), sum(sizes), why) for (name, why), sizes in found.items()]
    return sorted(rests, key=lambda rest: -rest.n_bytes)


def human(n_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    power = max(0, min((len(f"{n_bytes:.0f}") - 1) // 3, len(UNITS) - 1))
    return f"{n_bytes / 1000**power:.{1 if power else 0}f} {UNITS[power]}"
