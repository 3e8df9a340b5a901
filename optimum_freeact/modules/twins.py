"""Models with two stacks of blocks that hold the same tensors: DiffusionGemma's encoder and decoder.

The decoder's blocks are quantized. In the encoder's, a [`Twin`] takes the place of each quantized module: it has no tensors and
calls the decoder's. So what is tied stays tied, is stored once, and is saved under the decoder's names, as transformers saves it.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

from optimum_freeact.modules.experts import FreeActExperts
from optimum_freeact.modules.layout import find_blocks, find_decoder
from optimum_freeact.modules.linear import FreeActLinear


TWO_STACKS = ("diffusion_gemma",)


class Twin(nn.Module):
    """A module under a second name.

    Args:
        of (`nn.Module`): What is called; not registered, so that its tensors have one name.
    """

    def __init__(self, of: nn.Module):
        super().__init__()
        self.__dict__["of"] = of
        self._is_hf_initialized = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the other gives."""
        return self.of(*args, **kwargs)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"of the decoder's {type(self.of).__name__}"


def find_encoder(model: nn.Module) -> nn.Module | None:
    """The text model whose blocks are tied to the decoder's; `None` for all other models."""
    if getattr(getattr(model, "config", None), "model_type", None) not in TWO_STACKS:
        return None
    return getattr(model, "base_model", model).encoder.language_model


def find_reader(model: nn.Module) -> nn.Module:
    """The module whose tokens are told apart by what they are: the decoder, of two stacks the encoder."""
    return find_encoder(model) or find_decoder(model)


def tie_quantized(model: nn.Module) -> None:
    """Put a [`Twin`] of each quantized module of the decoder into the encoder, where there is one."""
    encoder = find_encoder(model)
    if encoder is None:
        return
    for block, twin in zip(find_blocks(model)[1], encoder.layers, strict=True):
        for name, module in block.named_modules():
            if isinstance(module, (FreeActLinear, FreeActExperts)):
                twin.set_submodule(name, Twin(module))
                parent = twin.get_submodule(name.rpartition(".")[0])
                if not parent._buffers:
                    parent._is_hf_initialized = True
    _tell_ties(model)


def untie_quantized(model: nn.Module) -> None:
    """Give each [`Twin`] its own module again, on the tensors of the plain one that stands in the decoder by now."""
    encoder = find_encoder(model)
    if encoder is None:
        return
    for block, twin in zip(find_blocks(model)[1], encoder.layers, strict=True):
        for name in [name for name, module in twin.named_modules() if isinstance(module, Twin)]:
            plain = block.get_submodule(name)
            second = copy.copy(plain)
            for kind in ("_parameters", "_buffers", "_modules"):
                second.__dict__[kind] = dict(plain.__dict__[kind])
            twin.set_submodule(name, second)
    owner = getattr(model, "base_model", model)
    owner.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _tell_ties(model: nn.Module) -> None:
    """Leave out of what transformers ties the names that are no more: it would refuse patterns that match unequally often."""
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    there |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    ties = {a: b for a, b in model.all_tied_weights_keys.items() if a in there and b in there}
    model.all_tied_weights_keys = ties
    owner, prefix = getattr(model, "base_model", model), ""
    if owner is not model:
        prefix = f"{model.base_model_prefix}."
        owner.all_tied_weights_keys = {
            a.removeprefix(prefix): b.removeprefix(prefix) for a, b in ties.items() if a.startswith(prefix)
        }
    owner._tied_weights_keys = {
        f"{re.escape(a.removeprefix(prefix))}$": f"{re.escape(b.removeprefix(prefix))}$"
        for a, b in ties.items()
        if a.startswith(prefix)
    }
