"""What makes a quantized model run (token types, KV cache), and what turns it back into a plain one."""

from __future__ import annotations

import torch
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.kv_buffers import NAME as CACHE_NAME
from optimum_freeact.modules.kv_cache import install_kv_cache
from optimum_freeact.modules.kv_means import rotary_frequencies
from optimum_freeact.modules.kv_store import CacheSpec
from optimum_freeact.modules.layout import find_decoder
from optimum_freeact.modules.surgery import input_name, quantized_linears
from optimum_freeact.token_types import TokenTyper, attach_state, install_typer


def activate(model: nn.Module, config: FreeActConfig) -> None:
    """Install the hooks that a quantized model needs to run: token types and KV cache."""
    for old in model.__dict__.pop("_freeact_hooks", []):
        old.remove()
    hooks = [install_typer(find_decoder(model), TokenTyper(config.token_types), attach_state(model))]
    if config.kv_bits < 16:
        hooks.append(install_kv_cache(model, cache_spec(model, config)))
    model.__dict__["_freeact_hooks"] = hooks
    for module in quantized_linears(model).values():
        module.prepare()


def cache_spec(model: nn.Module, config: FreeActConfig) -> CacheSpec:
    """How the cache is stored: about its means where they were measured, else rotated if the config rotates."""
    sinks = int("sink" in config.token_types)
    decoder = find_decoder(model)
    buffers = getattr(decoder, CACHE_NAME, None)
    if buffers is not None:
        return buffers.spec(config.kv_bits, sinks, rotary_frequencies(decoder))
    return CacheSpec(config.kv_bits, rotate=config.transform != "none", sink_tokens=sinks)


def dequantize_(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Replace quantized linears by plain ones in `dtype`, in place: exact up to what rounding has lost.

    Activations and the cache are no longer rounded; with several token types the bias is that of ordinary text.
    """
    dtype = dtype or torch.float32
    inputs = set()
    for name, module in quantized_linears(model).items():
        weight, bias = module.dequantized()
        plain = nn.Linear(module.in_features, module.out_features, bias is not None, device=weight.device, dtype=dtype)
        plain.weight.data.copy_(weight)
        if bias is not None:
            plain.bias.data.copy_(bias)
        model.set_submodule(name, plain)
        inputs.add(name)
    for name in inputs:
        parent, _, leaf = input_name([name]).rpartition(".")
        model.get_submodule(parent)._modules.pop(leaf, None)
    find_decoder(model)._modules.pop(CACHE_NAME, None)
    for hook in model.__dict__.pop("_freeact_hooks", []):
        hook.remove()
    return model
