"""Export to the compressed-tensors format: exact for what it can say, refused by name for what it cannot.

The format knows integer weights on symmetric grids per output channel or group, and activations rounded per token on a
symmetric grid that is made at run time. It is the same grid as ours (half a step beyond the last code), so codes and
scales are copied as they are. It does not know means or clips per token type, low-rank branches or our transforms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.kv_buffers import NAME as CACHE_NAME
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.surgery import quantized_linears


PACKED, BYTES = "pack-quantized", "int-quantized"  # the format's names for its two ways to store integers
#: Parts of an input that the format has no words for: buffer -> setting that leaves it out.
INEXPRESSIBLE = {
    "mean": "centring='none'",
    "channel_scale": "channel_scale='none'",
    "basis": "low_rank=0",
    "left": "transform='none'",
    "dense": "transform='none'",
    "keep": "exclusive='none'",
    "left_out": "exclusive='none'",
}


def check_expressible(model: nn.Module, config: FreeActConfig) -> None:
    """Refuse a model that the format cannot hold exactly.

    Raises:
        `ValueError`: naming every part that would be lost and the setting without it.
    """
    lost = set()
    for module in model.modules():
        if isinstance(module, FreeActInput):
            lost |= {wanted for name, wanted in INEXPRESSIBLE.items() if getattr(module, name, None) is not None}
            if module.bits < 16 and module.group_size is not None:
                lost.add("activation_group_size=None")
            if module.bits < 16 and not module.symmetric:
                lost.add("activation_symmetric=True")
            if module.bits < 16 and not bool((module.clip == 1).all()):
                lost.add("activation_clip=1.0")
    if config.kv_bits < 16:
        lost.add("kv_bits=16 (may be chosen when the model is loaded)")
    if config.embedding_bits == 8:
        lost.add("embedding_bits=16")
    if config.weight_bits == 16:
        lost.add("weight_bits=4 or 8")
    if lost:
        raise ValueError(
            f"compressed-tensors cannot hold this model exactly. Quantize it with {', '.join(sorted(lost))}; the preset "
            "'rtn', with rounding='gptq' and weight_clip='search' if wanted, has all of these."
        )


def pack_int32(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of shape `(m, n)`, signed, as unsigned numbers in `int32` words, the first code in the lowest bits.

    Args:
        codes (`torch.Tensor` of shape `(m, n)`): `int8`, in `[-2^(bits-1), 2^(bits-1) - 1]`.
        bits (`int`): 4 or 8.

    Returns:
        `torch.Tensor` of shape `(m, ceil(n * bits / 32))`, `int32`; a last word that is not full has zero bits.
    """
    per_word = 32 // bits
    unsigned = codes.to(torch.int64) + (1 << (bits - 1))
    unsigned = nn.functional.pad(unsigned, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = (unsigned << (torch.arange(per_word, device=codes.device) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def layout(config: FreeActConfig) -> str:
    """How transformers reads codes: packed words for weights alone, one byte each where activations are rounded too."""
    return PACKED if config.activation_bits == 16 else BYTES


def tensors(model: nn.Module, form: str) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors: codes (as `form` says) and scales of quantized weights, everything else as it is."""
    found = quantized_linears(model)
    inputs = {name for name, module in model.named_modules() if isinstance(module, FreeActInput)}
    result = {}
    for name, tensor in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")  # `weight_group_scale` is part of `weight_scale`
        if parent in inputs or f".{CACHE_NAME}." in f".{name}":
            continue
        if parent not in found:
            result[name] = tensor
        elif leaf == "weight":
            linear: FreeActLinear = found[parent]
            if form == PACKED:
                result[f"{parent}.weight_packed"] = pack_int32(linear.codes(), linear.bits)
                result[f"{parent}.weight_shape"] = torch.tensor([linear.out_features, linear.in_features])
            else:
                result[f"{parent}.weight"] = linear.codes()
        elif leaf == "qscale":
            result[f"{parent}.weight_scale"] = found[parent].group_steps()
        elif leaf == "type_bias":
            result[f"{parent}.bias"] = tensor[0]
    return {name: tensor.contiguous() for name, tensor in result.items()}


def quantization_config(model: nn.Module, config: FreeActConfig, form: str) -> dict[str, Any]:
    """The `quantization_config` of the exported checkpoint, its codes stored as `form` says."""
    quantized = set(quantized_linears(model))
    others = sorted(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in quantized)
    group = config.weight_group_size

    def grid(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
        return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, **more}

    weights = grid(config.weight_bits, "channel" if group is None else "group", dynamic=False)
    weights |= {} if group is None else {"group_size": group}
    activations = None if config.activation_bits == 16 else grid(config.activation_bits, "token", dynamic=True)
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": others,
    }
