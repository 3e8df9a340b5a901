"""What can be known of a model before the long work of calibrating it, and of its inputs as soon as they are measured."""

from __future__ import annotations

from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.experts import find_experts, stand_ins
from optimum_freeact.modules.layout import block_linears, find_blocks, is_excluded
from optimum_freeact.modules.surgery import check_linear, resolve_group_sizes
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.finite import all_finite


def check_model(model: nn.Module, config: FreeActConfig) -> None:
    """Everything that can be known before the long work: shapes fit, weights are finite, something to quantize.

    A preset's group sizes are replaced where they do not fit.

    Raises:
        `ValueError`: naming the module.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; calibration follows one chain of blocks: quantize a "
            "decoder-only model."
        )
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise ValueError(
            f"{len(absent)} weights of {type(model).__name__} are on the meta device or offloaded, the first is {absent[0]!r}: "
            "load the model on 'cpu' (blocks are moved to the GPU one by one) to quantize it."
        )
    prefix, blocks = find_blocks(model)
    found: dict = {}
    for index, block in enumerate(blocks):
        names = block_linears(block, f"{prefix}.{index}", config.modules_to_not_convert)
        found |= {f"{prefix}.{index}.{name}": module for name, module in names.items()}
        for name, module in block_experts(block, f"{prefix}.{index}", config.modules_to_not_convert).items():
            found |= stand_ins(f"{prefix}.{index}.{name}", module)
    resolve_group_sizes(config, found)
    for name, module in found.items():
        check_linear(name, module, config)
    if not found:
        kinds = sorted({type(m).__name__ for m in blocks.modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"No linear to quantize: the blocks hold {kinds}, of which only plain nn.Linear is supported, and "
            f"modules_to_not_convert={config.modules_to_not_convert}."
        )
    check_finite(model)


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or infinity anywhere, also where nothing is quantized: its checkpoint could not be loaded.

    Raises:
        `ValueError`: naming the first such tensor.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not tensor.is_meta and not all_finite(tensor):
            raise ValueError(
                f"The weight {name!r} holds NaN or inf: repair the model, or fetch it again, before quantizing. Leaving "
                "the module out does not help, since all that reads its output would be NaN."
            )


def block_experts(block: nn.Module, prefix: str, excluded: list[str] | None) -> dict[str, nn.Module]:
    """Experts inside a block that can be quantized, by name relative to the block."""
    return {name: m for name, m in find_experts(block).items() if not is_excluded(f"{prefix}.{name}", excluded)}


def check_moments(moments: Moments, name: str) -> None:
    """Raise a `ValueError` that names the linear if its inputs are not finite."""
    if not moments.is_finite():
        raise ValueError(
            f"The input of '{name}' holds NaN or inf in calibration: nothing can be fitted to it. Check "
            "the model in full precision on the same data, or load it in bfloat16 or float32 instead of float16."
        )
