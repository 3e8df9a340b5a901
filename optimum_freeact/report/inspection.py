"""What a model's config and file headers say about its quantization; no weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from optimum_freeact.config import FreeActConfig
from optimum_freeact.hf.auto import auto_class
from optimum_freeact.kernels.dispatch import plan
from optimum_freeact.kernels.kv_dispatch import kv_obstacle
from optimum_freeact.modules.experts import FreeActExperts, find_experts, stand_ins
from optimum_freeact.modules.layout import block_linears, find_blocks, is_excluded
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.surgery import build_empty
from optimum_freeact.report.sizes import QuantizedSize, Rest, quantized_size, tensor_bytes, unquantized
from optimum_freeact.type_state import TypeState


@dataclass(frozen=True)
class Kind:
    """All quantized linears of one name, over the blocks: how many, their shape, bytes stored and in bfloat16.

    Bytes are the linears' own; what the linears of one input share is counted under the input's name.
    """

    name: str
    n_modules: int
    shape: str
    stored_bytes: int
    bf16_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What [`inspect_model`] finds.

    Args:
        quantized (`bool`): Whether the model is quantized; if not, `kinds` and `size` say what would be.
        settings (`dict`): The quantization's settings.
        n_blocks (`int`): Decoder blocks.
        kinds (`list[Kind]`): What is quantized.
        size (`QuantizedSize`): All of it together.
        rest (`list[Rest]`): What is not, and why.
        record (`dict`, *optional*): The saved record of calibration.
        kernel (`tuple[str, str]`): The product that runs, and why.
        cache (`tuple[str, str]`, *optional*): What writes and reads a quantized KV cache, and why.
        file_bytes (`int`): Bytes of the weight files here; 0 where they are not in a folder.
    """

    quantized: bool
    settings: dict[str, Any]
    n_blocks: int
    kinds: list[Kind]
    size: QuantizedSize
    rest: list[Rest]
    record: dict[str, Any] | None
    kernel: tuple[str, str]
    cache: tuple[str, str] | None = None
    file_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self) | {"ratio": self.size.ratio}


def inspect_model(source: PretrainedConfig, folder: Path | None, device: torch.device) -> Inspection:
    """Build the model on the meta device and look at it.

    Args:
        source (`PretrainedConfig`): The model's config.
        folder (`Path`, *optional*): Its folder, if it is one here: its files are counted.
        device (`torch.device`): Where it would run.

    Raises:
        `ValueError`: for another quantization method, a newer format, no language model, or no decoder blocks.
    """
    found = getattr(source, "quantization_config", None)
    found = found if found is None or isinstance(found, dict) else found.to_dict()
    if found is not None and found.get("quant_method") != "freeact":
        raise ValueError(
            f"The model is quantized with {found.get('quant_method')!r}; only 'freeact' can be inspected."
        )
    config = FreeActConfig() if found is None else FreeActConfig.from_dict(dict(found))
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    maker = auto_class(source)
    with torch.device("meta"):
        model = maker.from_config(source, dtype=getattr(source, "dtype", None) or torch.float32)
    prefix, blocks = find_blocks(model)
    if found is None:
        kinds, size, planned = _planned(prefix, blocks, config)
    else:
        build_empty(model, config, TypeState())
        kinds, size, planned = _kinds(prefix, blocks), quantized_size(model), []
    return Inspection(
        quantized=found is not None,
        settings=config.to_dict(),
        n_blocks=len(blocks),
        kinds=kinds,
        size=size,
        rest=unquantized(model, planned),
        record=config.calibration_record,
        kernel=kernel_of(config, device),
        cache=cache_of(config, source, device),
        file_bytes=sum(path.stat().st_size for path in files),
    )


def kernel_of(config: FreeActConfig, device: torch.device) -> tuple[str, str]:
    """The product that a model with these settings runs on a device, and why."""
    found = plan(
        device,
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        group_size=config.weight_group_size,
        transform=config.transform,
        activation_group_size=config.activation_group_size,
        low_rank=config.low_rank,
    )
    return found.product, found.reason


def cache_of(config: FreeActConfig, source: PretrainedConfig, device: torch.device) -> tuple[str, str] | None:
    """What writes and reads the KV cache of a model with these settings on a device, and why; `None` for one of 16 bits."""
    if config.kv_bits == 16:
        return None
    text = source.get_text_config(decoder=True)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = getattr(source, "dtype", None) or torch.float32
    obstacle = kv_obstacle(device, config.kv_bits, dtype, size, bool(config.kv_rotation))
    if obstacle is None:
        return "Triton kernels", "they agree with torch on this GPU; layers with a sliding window are read by torch"
    return "torch", obstacle


def _kinds(prefix: str, blocks: nn.ModuleList) -> list[Kind]:
    """Quantized linears and their inputs, by name inside the block."""
    found: dict[tuple[str, str], list[int]] = {}
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, FreeActLinear):
                key, weights = (name, f"{module.out_features} x {module.in_features}"), module
                sizes = (tensor_bytes(module.state_dict().values()), 2 * weights.in_features * weights.out_features)
            elif isinstance(module, FreeActExperts):
                for product, (m, d) in zip(module.names, module.shapes, strict=True):
                    own = [t for key, t in module.own_tensors().items() if key.startswith(product)]
                    shape, weights = f"{module.num_experts} x {m} x {d}", module.num_experts * m * d
                    total = found.setdefault((f"{name}.{product}", shape), [0, 0, 0])
                    found[f"{name}.{product}", shape] = [
                        total[0] + 1, total[1] + tensor_bytes(own), total[2] + 2 * weights
                    ]  # fmt: skip
                continue
            elif name.endswith("_input") and hasattr(module, "input_map"):
                key, sizes = (name, str(module.in_features)), (tensor_bytes(module.state_dict().values()), 0)
            else:
                continue
            total = found.setdefault(key, [0, 0, 0])
            found[key] = [total[0] + 1, total[1] + sizes[0], total[2] + sizes[1]]
    return [Kind(f"{prefix}.*.{name}", n, shape, *sizes) for (name, shape), (n, *sizes) in found.items()]


def _planned(prefix: str, blocks: nn.ModuleList, config: FreeActConfig) -> tuple[list[Kind], QuantizedSize, list[str]]:
    """What quantizing would take, and the modules' names; nothing is stored yet."""
    found: dict[tuple[str, str], int] = {}
    names = []
    for index, block in enumerate(blocks):
        for name, module in block_linears(block, f"{prefix}.{index}", config.modules_to_not_convert).items():
            key = (name, f"{module.out_features} x {module.in_features}")
            found[key] = found.get(key, 0) + 1
            names.append(f"{prefix}.{index}.{name}")
        for name, module in find_experts(block).items():
            if is_excluded(f"{prefix}.{index}.{name}", config.modules_to_not_convert):
                continue
            names.append(f"{prefix}.{index}.{name}")
            for product, linear in stand_ins(name, module).items():
                key = (product, f"{module.num_experts} x {linear.out_features} x {linear.in_features}")
                found[key] = found.get(key, 0) + 1
    kinds, weights, n_linears = [], 0, 0
    for (name, shape), count in found.items():
        *several, out, inner = map(int, shape.split(" x "))
        n_experts = several[0] if several else 1
        n_linears += count * n_experts
        weights += count * n_experts * out * inner
        kinds.append(Kind(f"{prefix}.*.{name}", count, shape, 0, 2 * count * n_experts * out * inner))
    return kinds, QuantizedSize(n_linears, 0, weights, 0, 2 * weights), names
