"""Published peers: what they offer at four bits, applied to the same linears (those inside the decoder blocks).

Each entry quantizes a loaded model in place. A peer that is not installed or refuses raises, and the benchmark lists
it with that reason. None of them is needed by the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from optimum_freeact.modules.layout import block_linears, find_blocks


@dataclass(frozen=True)
class Peer:
    """One way of one package: its setting in our words, the model's dtype it needs, and the function that applies it.

    `apply(model, names, samples)` gets the names of the linears to quantize and calibration ids `(n, length)`.
    """

    package: str
    setting: str
    dtype: str
    apply: Callable[[nn.Module, list[str], torch.Tensor], Any]
    about: str
    devices: tuple[str, ...] = ("cpu", "cuda")


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that we quantize, by full name."""
    prefix, blocks = find_blocks(model)
    return {
        f"{prefix}.{i}.{name}": linear
        for i, block in enumerate(blocks)
        for name, linear in block_linears(block, f"{prefix}.{i}", None).items()
    }


def _hqq(group_size: int | None):
    def apply(model: nn.Module, names: list[str], samples: torch.Tensor) -> None:  # noqa: ARG001
        from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

        HQQLinear.set_backend(HQQBackend.PYTORCH)
        for name in names:
            linear = model.get_submodule(name)
            config = BaseQuantizeConfig(nbits=4, group_size=group_size or linear.in_features, axis=1)
            device = str(linear.weight.device)
            new = HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device=device, del_orig=False)
            model.set_submodule(name, new)

    return apply


def _torchao(make_config: Callable[[], Any]):
    def apply(model: nn.Module, names: list[str], samples: torch.Tensor) -> None:  # noqa: ARG001
        from torchao.quantization import quantize_

        wanted = set(names)
        quantize_(model, make_config(), filter_fn=lambda module, name: name in wanted)  # noqa: ARG005

    return apply


def _torchao_weight_only(group_size: int | None):
    def make():
        from torchao.quantization import IntxWeightOnlyConfig

        return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=_granularity(group_size))

    return _torchao(make)


def _torchao_dynamic(group_size: int | None):
    def make():
        import torchao.quantization as ao

        if hasattr(ao, "Int8DynamicActivationIntxWeightConfig"):
            return ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=_granularity(group_size)
            )
        if group_size is None:
            raise NotImplementedError("Int8DynamicActivationInt4WeightConfig has no per-channel weights.")
        return ao.Int8DynamicActivationInt4WeightConfig(group_size=group_size)

    return _torchao(make)


def _granularity(group_size: int | None):
    from torchao.quantization import PerAxis, PerGroup

    return PerAxis(0) if group_size is None else PerGroup(group_size)


def _torchao_tinygemm(group_size: int):
    def make():
        from torchao.quantization import Int4WeightOnlyConfig

        return Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d")

    return _torchao(make)


def _torchao_fp8(model: nn.Module, names: list[str], samples: torch.Tensor) -> None:
    from torchao.quantization import Float8DynamicActivationInt4WeightConfig

    _torchao(Float8DynamicActivationInt4WeightConfig)(model, names, samples)


def _quanto(activations: bool):
    def apply(model: nn.Module, names: list[str], samples: torch.Tensor) -> None:
        from optimum.quanto import Calibration, freeze, qint4, qint8, quantize

        _use_portable_unpacking()
        quantize(model, weights=qint4, activations=qint8 if activations else None, include=names)
        if activations:
            with torch.no_grad(), Calibration():
                for ids in samples.split(1):
                    model(input_ids=ids.to(model.device))
        freeze(model)

    return apply


def _use_portable_unpacking() -> None:
    """Let quanto unpack its codes with plain torch: else it compiles C++ and CUDA for minutes on first use."""
    from types import SimpleNamespace

    from optimum.quanto.library.extensions import get_extension, is_extension_available

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    for name in ("quanto_cpp", "quanto_cuda"):
        if is_extension_available(name):
            get_extension(name)._lib = SimpleNamespace(unpack=unpack)


PEERS: dict[str, Peer] = {
    "hqq-g64": Peer("hqq", "w4a16", "float32", _hqq(64), "asymmetric, groups of 64"),
    "hqq-channel": Peer("hqq", "w4a16", "float32", _hqq(None), "asymmetric, one scale per output channel"),
    "torchao-g64": Peer(
        "torchao",
        "w4a16",
        "float32",
        _torchao_weight_only(64),
        "IntxWeightOnlyConfig, groups of 64, codes kept in int8",
    ),
    "torchao-channel": Peer(
        "torchao",
        "w4a16",
        "float32",
        _torchao_weight_only(None),
        "IntxWeightOnlyConfig, per output channel, codes kept in int8",
    ),
    "torchao-tinygemm-g64": Peer(
        "torchao",
        "w4a16",
        "bfloat16",
        _torchao_tinygemm(64),
        "Int4WeightOnlyConfig with the tinygemm kernel, groups of 64, model in bfloat16",
        ("cuda",),
    ),
    "torchao-dynamic-g32": Peer(
        "torchao",
        "w4a8",
        "float32",
        _torchao_dynamic(32),
        "dynamic int8 activations, asymmetric per token; int4 weights in groups of 32, kept in int8",
    ),
    "torchao-dynamic-channel": Peer(
        "torchao",
        "w4a8",
        "float32",
        _torchao_dynamic(None),
        "dynamic int8 activations, asymmetric per token; int4 weights per output channel, kept in int8",
    ),
    "torchao-float8": Peer(
        "torchao",
        "w4a8",
        "bfloat16",
        _torchao_fp8,
        "dynamic float8 activations, int4 weights in groups of 128, model in bfloat16",
        ("cuda",),
    ),
    "quanto": Peer("optimum-quanto", "w4a16", "float32", _quanto(False), "qint4 weights in its own group size"),
    "quanto-qint8": Peer(
        "optimum-quanto",
        "w4a8",
        "float32",
        _quanto(True),
        "qint4 weights, qint8 activations with one static scale per tensor",
    ),
}


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor as stored: tensor subclasses are taken apart into the plain tensors inside."""
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item) for item in value)
    if not isinstance(value, torch.Tensor):
        return 0
    flatten = getattr(value, "__tensor_flatten__", None)
    inner = flatten()[0] if type(value) is not torch.Tensor and flatten is not None else []
    if inner:
        return sum(tensor_bytes(getattr(value, name)) for name in inner)
    return value.numel() * value.element_size()


def module_bytes(module: nn.Module) -> int:
    """Bytes of everything a quantized module keeps."""
    if hasattr(module, "W_q"):  # HQQLinear keeps scales and zero points in a dict
        return tensor_bytes([module.W_q.data, module.meta, getattr(module, "bias", None)])
    tensors = {id(t): t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None}
    return tensor_bytes(list(tensors.values()))
