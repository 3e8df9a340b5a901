"""Put quantized modules in place of linears: empty ones on the meta device for loading, or fitted ones one by one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.branch_rank import rank_of, type_rank_of
from optimum_freeact.modules.embeddings import replace_embeddings
from optimum_freeact.modules.experts import FreeActExperts, find_experts, stand_ins
from optimum_freeact.modules.kv_buffers import NAME as CACHE_NAME
from optimum_freeact.modules.kv_buffers import CacheMeanBuffers
from optimum_freeact.modules.layout import find_blocks, find_decoder
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.twins import tie_quantized
from optimum_freeact.transforms.exclusive import share_of
from optimum_freeact.type_rules import SINK
from optimum_freeact.type_state import TypeState


logger = logging.getLogger(__name__)


def input_name(group: list[str]) -> str:
    """Name of a group's input module: beside the first linear, `self_attn.q_proj` -> `self_attn.q_proj_input`."""
    return f"{group[0]}_input"


def is_masked(config: FreeActConfig, group: list[str]) -> bool:
    """Whether the input of these linears has coordinates that belong to single types."""
    several = len([name for name in config.token_types if name != SINK]) > 1
    return config.exclusive == "fixed" and several and share_of(config.exclusive_share, group) > 0


# linears that read the attention's output, in the families of layout.py and in common remote code
ATTENTION_READERS = ("o_proj", "out_proj", "attn_out", "dense")


def is_compensated(config: FreeActConfig, group: list[str]) -> bool:
    """Whether this is the linear behind the attention and its input's moments are set right."""
    reads = len(group) == 1 and group[0].rpartition(".")[2] in ATTENTION_READERS
    return config.attention_compensation and reads and "mlp" not in group[0]


GROUP_SIZES = (32, 16)  # what may replace a preset's size where that does not divide


def resolve_group_sizes(config: FreeActConfig, linears: dict[str, nn.Linear]) -> None:
    """Replace a preset's group size that does not divide all widths by the largest that does, or by none; in place.

    A size that the caller gave is left alone: [`check_linear`] refuses it by name.
    """
    for field in ("weight_group_size", "activation_group_size"):
        size = getattr(config, field)
        if size is None or field in config.given:
            continue
        misfits = [name for name, module in linears.items() if module.in_features % size]
        if not misfits:
            continue
        fitting = [s for s in GROUP_SIZES if s < size and all(m.in_features % s == 0 for m in linears.values())]
        found = fitting[0] if fitting else None
        setattr(config, field, found)
        logger.warning(
            "%s=%d of preset %r does not divide in_features=%d of %r (and %d more): %s is used for this model. Name such "
            "modules in modules_to_not_convert to keep it.",
            field,
            size,
            config.preset,
            linears[misfits[0]].in_features,
            misfits[0],
            len(misfits) - 1,
            found,
        )


def check_linear(name: str, module: nn.Linear, config: FreeActConfig) -> None:
    """Raise a `ValueError` if a linear's shape does not fit the config; the message names module and remedy."""
    n = module.in_features
    size = config.weight_group_size
    if size is not None and n % size:
        divisors = [d for d in (16, 32, 64, 128, 256) if n % d == 0]
        raise ValueError(
            f"weight_group_size={size} does not divide in_features={n} of {name!r}; use one of {divisors}, or None for "
            f"one scale per output channel, or add {name.rpartition('.')[2]!r} to modules_to_not_convert."
        )
    size = config.activation_group_size
    if size is not None and n % size:
        divisors = [d for d in (16, 32, 64, 128, 256) if n % d == 0]
        raise ValueError(
            f"activation_group_size={size} does not divide in_features={n} of {name!r}; use one of {divisors}, or None "
            f"for one grid per token, or add {name.rpartition('.')[2]!r} to modules_to_not_convert."
        )
    if config.weight_bits == 4 and n % 2:
        raise ValueError(
            f"{name!r} has an odd in_features={n}: 4-bit codes are packed in pairs. Add it to modules_to_not_convert."
        )


@contextmanager
def float32_default() -> Iterator[None]:
    """Scales, maps and biases are float32 in every model: `from_pretrained(dtype=...)` sets another default around us."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def replace_group(
    block: nn.Module,
    group: list[str],
    config: FreeActConfig,
    state: TypeState,
    device: torch.device | str,
    n_left_out: int = 0,
) -> tuple[FreeActInput, list[FreeActLinear]]:
    """Replace the named linears of a block by empty quantized ones on `device`; returns what was put in place."""
    first = block.get_submodule(group[0])
    n = first.in_features
    means = {"none": 0, "shared": 1, "per_type": config.n_types}[config.centring]
    with torch.device(device), float32_default():
        source = FreeActInput(
            n,
            n_types=config.n_types,
            n_means=means,
            channel_scale=config.channel_scale != "none",
            rank=rank_of(config, n, [block.get_submodule(name).out_features for name in group]),
            transform=config.transform,
            bits=config.activation_bits,
            symmetric=config.activation_symmetric,
            group_size=config.activation_group_size,
            n_readers=len(group),
            state=state,
            masked=is_masked(config, group),
            n_left_out=n_left_out,
            type_rank=type_rank_of(config, n),
        )
        replaced = []
        for name in group:
            old = block.get_submodule(name)
            new = FreeActLinear(
                n,
                old.out_features,
                source,
                bits=config.weight_bits,
                group_size=n if config.weight_bits == 16 else config.weight_group_size or n,
                bias=old.bias is not None or is_compensated(config, group),
                dtype=getattr(torch, config.weight_dtype or "float32"),
            )
            new.train(old.training)
            block.set_submodule(name, new)
            replaced.append(new)
            _leave_alone(block.get_submodule(name.rpartition(".")[0]))
        block.set_submodule(input_name(group), source.train(first.training))
    return source, replaced


def _leave_alone(parent: nn.Module) -> None:
    """Keep transformers from initialising a module whose linears were replaced: some reach into them by name.

    One with buffers of its own, which initialising computes, is left to it. That parameters are complete is checked anyway.
    """
    if not parent._buffers:
        parent._is_hf_initialized = True


def replace_experts(
    block: nn.Module, name: str, config: FreeActConfig, state: TypeState, device: torch.device | str
) -> FreeActExperts:
    """Replace the named experts of a block by empty quantized ones on `device`."""
    plain = block.get_submodule(name)
    with torch.device(device), float32_default():
        made = FreeActExperts(plain, config, state, functools.partial(rank_of, config))
    block.set_submodule(name, made.train(plain.training))
    return made


def build_empty(model: nn.Module, config: FreeActConfig, state: TypeState) -> None:
    """Give a model on the meta device the quantized modules that its checkpoint was saved with."""
    _, blocks = find_blocks(model)
    groups = config.input_groups
    if not groups:
        raise ValueError(
            "The checkpoint's config lacks 'input_groups': it was not written by FreeActConfig's quantizer."
        )
    check_recorded(blocks, config)
    if config.embedding_bits == 8:
        replace_embeddings(model, "meta")
    if config.cache_shapes:
        with torch.device("meta"), float32_default():
            find_decoder(model).add_module(CACHE_NAME, CacheMeanBuffers(config.cache_shapes))
    for index, block in enumerate(blocks):
        for group in groups.get(str(index), groups.get("*", [])):
            n_left_out = (config.exclusive_sizes or {}).get(f"{index}.{group[0]}", 0)
            replace_group(block, group, config, state, "meta", n_left_out)
        for name in experts_of(config, index):
            replace_experts(block, name, config, state, "meta")
    tie_quantized(model)


def experts_of(config: FreeActConfig, index: int) -> list[str]:
    """Names of the quantized experts of a block."""
    recorded = config.experts or {}
    return recorded.get(str(index), recorded.get("*", []))


def check_recorded(blocks: nn.ModuleList, config: FreeActConfig) -> None:
    """Refuse what a checkpoint's config records of its modules if this model cannot have it.

    Raises:
        `ValueError`: naming the field; the config was changed or damaged after saving.
    """

    def refuse(field: str, what: str) -> None:
        raise ValueError(f"quantization_config.{field} in config.json {what}: it was changed or damaged after saving.")

    groups, shapes = config.input_groups, config.cache_shapes
    if not isinstance(groups, dict) or not all(isinstance(group, list) for group in groups.values()):
        refuse("input_groups", "must map blocks to lists of groups")
    for index, block in enumerate(blocks):
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for group in groups.get(str(index), groups.get("*", [])):
            if not isinstance(group, list) or not group or not all(isinstance(n, str) and n in linears for n in group):
                refuse("input_groups", f"names {group!r}, which are no linears of block {index}")
            for name in group:
                check_linear(name, block.get_submodule(name), config)
    recorded = config.experts
    if recorded is not None and not (
        isinstance(recorded, dict) and all(isinstance(names, list) for names in recorded.values())
    ):
        refuse("experts", "must map blocks to lists of names")
    for index, block in enumerate(blocks):
        known = find_experts(block) if recorded else {}
        for name in experts_of(config, index):
            if not isinstance(name, str) or name not in known:
                refuse("experts", f"names {name!r}, which are no experts of block {index}")
            for full, linear in stand_ins(name, known[name]).items():
                check_linear(full, linear, config)
    sizes = config.exclusive_sizes
    if sizes is not None and not (
        isinstance(sizes, dict) and all(isinstance(n, int) and 0 <= n < 2**20 for n in sizes.values())
    ):
        refuse("exclusive_sizes", f"is {str(sizes)[:80]}, not a number for each input")
    if config.weight_dtype is not None and config.weight_dtype not in ("float32", "float16", "bfloat16", "float64"):
        refuse("weight_dtype", f"is {config.weight_dtype!r}, no floating-point type")
    if shapes is not None and not (
        isinstance(shapes, list)
        and len(shapes) == len(blocks)
        and all(
            isinstance(s, list) and len(s) in (0, 2) and all(type(n) is int and 0 < n < 2**20 for n in s)
            for s in shapes
        )
    ):
        refuse("cache_shapes", f"is {str(shapes)[:80]}, not one (heads, head_dim) a block")


def quantized_linears(model: nn.Module) -> dict[str, FreeActLinear]:
    """All quantized linears by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FreeActLinear)}
