"""What makes a quantized model run (token types, KV cache), and what turns it back into a plain one."""

from __future__ import annotations

import torch
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.embeddings import FreeActEmbedding, FreeActHead, restore_embeddings
from optimum_freeact.modules.experts import FreeActExperts
from optimum_freeact.modules.kv_buffers import NAME as CACHE_NAME
from optimum_freeact.modules.kv_cache import install_kv_cache
from optimum_freeact.modules.kv_means import rotary_frequencies
from optimum_freeact.modules.kv_store import CacheSpec
from optimum_freeact.modules.layout import find_decoder
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.surgery import input_name, quantized_linears
from optimum_freeact.modules.twins import find_reader, untie_quantized
from optimum_freeact.token_types import TokenTyper
from optimum_freeact.type_hooks import install_typing
from optimum_freeact.type_rules import check_against
from optimum_freeact.type_state import attach_state


ROUNDED = (
    0.02  # how much of the largest difference of means is more than their rounding (and that of the biases) can be
)


def activate(model: nn.Module, config: FreeActConfig) -> None:
    """Install the hooks that a quantized model needs to run: token types and KV cache."""
    for old in model.__dict__.pop("_freeact_hooks", []):
        old.remove()
    check_against(model, config.type_rules, config.typer)
    typer = TokenTyper(config.token_types, config.type_rules, config.typer, config.cluster_table)
    hooks = install_typing(model, find_reader(model), typer, attach_state(model))
    if config.kv_bits < 16:
        hooks.append(install_kv_cache(model, cache_spec(model, config)))
    model.__dict__["_freeact_hooks"] = hooks
    for module in model.modules():
        if isinstance(module, (FreeActInput, FreeActLinear, FreeActExperts, FreeActEmbedding, FreeActHead)):
            module.prepare()


def cache_spec(model: nn.Module, config: FreeActConfig) -> CacheSpec:
    """How the cache is stored: about its means where they were measured, rotated as the config records.

    Where it records nothing the checkpoint is of a release that rotated only what had no means.
    """
    sinks = int("sink" in config.token_types)
    decoder = find_decoder(model)
    buffers = getattr(decoder, CACHE_NAME, None)
    if buffers is not None:
        return buffers.spec(config.kv_bits, bool(config.kv_rotation), sinks, rotary_frequencies(decoder))
    rotates = config.transform != "none" if config.kv_rotation is None else config.kv_rotation
    return CacheSpec(config.kv_bits, rotates, sinks)


def dequantize_(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Replace quantized linears by plain ones, in place; activations and the cache are no longer rounded.

    The whole model is in `dtype` (`None`: float32) afterwards.

    Raises:
        `ValueError`: if tensors are offloaded; nothing has changed then.
    """
    dtype = dtype or torch.float32
    found = quantized_linears(model)
    experts = {name: module for name, module in model.named_modules() if isinstance(module, FreeActExperts)}
    offloaded = [name for name, module in found.items() if module.weight.device.type == "meta"]
    offloaded += [name for name, module in experts.items() if any(p.is_meta for p in module.parameters())]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} quantized modules ({offloaded[0]}, ...) are offloaded: load the model without a disk or "
            "CPU offload to dequantize it."
        )
    for name, module in found.items():
        weight, bias = plain_weight(module)
        plain = nn.Linear(module.in_features, module.out_features, bias is not None, device=weight.device, dtype=dtype)
        plain.weight.data.copy_(weight)
        if bias is not None:
            plain.bias.data.copy_(bias)
        plain.train(module.training)
        model.set_submodule(name, plain)
    for name in found:
        parent, _, leaf = input_name([name]).rpartition(".")
        model.get_submodule(parent)._modules.pop(leaf, None)
    for name, module in experts.items():
        model.set_submodule(name, module.restored(plain_weight, dtype).train(module.training))
    untie_quantized(model)
    restore_embeddings(model, dtype)
    find_decoder(model)._modules.pop(CACHE_NAME, None)
    for hook in model.__dict__.pop("_freeact_hooks", []):
        hook.remove()
    for name, tensor in model.state_dict(keep_vars=True).items():  # a model of two types does not run
        if tensor.is_floating_point() and not kept_in_float32(model, name, dtype):
            tensor.data = tensor.data.to(dtype)
    return model


def kept_in_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers would load this tensor in float32 though the model is asked for in `dtype`."""
    kept = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }
    patterns = [pattern for field in kept.get(dtype, ()) for pattern in getattr(model, field, None) or ()]
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


@torch.no_grad()
def plain_weight(module: FreeActLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the plain linear that replaces a quantized one; a bias only if the original had one.

    The bias per token type says what the layer answers to each type's mean. A plain linear has no types, so its weight
    is given the same answers, by the smallest change that does so: along the means it becomes as good as the biases,
    and everywhere else it stays the rounded weight.
    """
    weight, bias = module.dequantized()
    rows = module.bias_rows()
    if module.source.mean is None or rows is None:
        return weight, bias
    means, answers, weight = module.source.mean.double(), rows.double(), weight.double()
    if module.has_bias:  # type 0's answer is the bias's business, those of the others relative to it the weight's
        change, bias = (means - means[0])[1:], answers[0] - weight @ means[0]
        wanted = (answers - answers[0])[1:]
    else:
        change, wanted, bias = means, answers, None
    if len(change):  # nothing along what rounding alone tells apart: a type without tokens has the mean of the others
        weight = weight + torch.linalg.pinv(change, rtol=ROUNDED).matmul(wanted - change @ weight.mT).mT
    if bias is not None:
        bias = answers[0] - weight @ means[0]
    return weight.float(), None if bias is None else bias.float()
