"""Re-parameterised copies of a model: other weights, sometimes other widths and depths, the same function.

A correct transport undoes every one of these. They serve as tests, as examples and as a self-check on one's own model.
Each function takes and returns `(config, state dict)` and leaves its input alone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from mergekit_ot.structure import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Structure,
    layer_tensor,
    read_structure,
)


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    Checkpoint = tuple[PretrainedConfig, dict[str, torch.Tensor]]

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def permuted(config: PretrainedConfig, state: dict[str, torch.Tensor], seed: int = 0) -> Checkpoint:
    """Permute the stream, the neurons, the key/value groups, the query heads and the value axes."""
    config, state, shape = _start(config, state)
    draw = torch.Generator().manual_seed(seed)
    stream = torch.randperm(shape.width, generator=draw)
    for name in _stream_columns(state, shape):
        state[name] = state[name][:, stream]
    for name in _stream_rows(state, shape):
        state[name] = state[name][stream]
    for layer in range(shape.n_layers):
        neurons = torch.randperm(shape.mlp_width, generator=draw)
        _take_rows(state, layer, ("mlp.gate_proj", "mlp.up_proj"), neurons)
        _take_columns(state, layer, "mlp.down_proj", neurons)
        groups = torch.randperm(shape.n_kv_heads, generator=draw)
        heads = torch.cat([g * shape.group + torch.randperm(shape.group, generator=draw) for g in groups])
        axes = torch.stack([torch.randperm(shape.head_dim, generator=draw) for _ in groups])  # one order per group
        plain = torch.arange(shape.head_dim)
        _take_rows(state, layer, ("self_attn.q_proj",), _head_rows(heads, plain, shape))
        _take_rows(state, layer, ("self_attn.k_proj",), _head_rows(groups, plain, shape))
        _take_rows(state, layer, ("self_attn.v_proj",), _head_rows(groups, axes, shape))
        _take_columns(
            state, layer, "self_attn.o_proj", _head_rows(heads, axes.repeat_interleave(shape.group, 0), shape)
        )
    return config, state


def widened(config: PretrainedConfig, state: dict[str, torch.Tensor]) -> Checkpoint:
    """Hold every stream channel, neuron, query head and key/value group twice."""
    config, state, shape = _start(config, state, untie=True)
    for name in _stream_columns(state, shape):
        half = 1.0 if name == EMBEDDING else 2.0
        if name == EMBEDDING and shape.family.scaled_embedding:
            half = 2.0**0.5  # the wider copy's scale is larger by this much
        state[name] = torch.cat([state[name], state[name]], dim=1) / half
    for name in _stream_rows(state, shape):
        state[name] = torch.cat([state[name], state[name]])
    for layer in range(shape.n_layers):
        for part in READERS:
            for kind in ("weight", "bias"):
                name = layer_tensor(layer, f"{part}.{kind}")
                if name in state:
                    state[name] = torch.cat([state[name], state[name]])
        for part in WRITERS:
            name = layer_tensor(layer, f"{part}.weight")
            state[name] = torch.cat([state[name], state[name]], dim=1) / 2
    config.hidden_size, config.intermediate_size = 2 * shape.width, 2 * shape.mlp_width
    config.num_attention_heads, config.num_key_value_heads = 2 * shape.n_heads, 2 * shape.n_kv_heads
    config.head_dim = shape.head_dim
    return config, state


def deepened(config: PretrainedConfig, state: dict[str, torch.Tensor], after: tuple[int, ...] = (0, 2)) -> Checkpoint:
    """Insert a block that adds nothing to the stream after each of the named layers."""
    config, state, shape = _start(config, state)
    order = [(layer, False) for layer in range(shape.n_layers)]
    for layer in sorted(after, reverse=True):
        order.insert(layer + 1, (layer, True))
    result = {name: tensor for name, tensor in state.items() if not name.startswith("model.layers.")}
    for new, (old, is_identity) in enumerate(order):
        prefix = layer_tensor(old, "")
        for name in [name for name in state if name.startswith(prefix)]:
            part = name.removeprefix(prefix)
            silent = is_identity and part.rpartition(".")[0] in WRITERS
            result[layer_tensor(new, part)] = torch.zeros_like(state[name]) if silent else state[name].clone()
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[old] for old, _ in order]
    return config, result


def rotated(config: PretrainedConfig, state: dict[str, torch.Tensor], seed: int = 0) -> Checkpoint:
    """Rotate the stream by a random orthogonal matrix, after folding the norm gains into the readers.

    Raises:
        `ValueError`: for models with norms between blocks and stream whose gains differ from channel to channel:
            rotations do not commute with those, so no rotated copy exists.
    """
    config, state, shape = _start(config, state, untie=True)
    draw = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(shape.width, shape.width, generator=draw, dtype=torch.float64)).Q
    family, offset = shape.family, shape.family.norm_offset
    for layer in range(shape.n_layers):
        for part in (family.attention_post_norm, family.mlp_post_norm):
            if part is not None:
                gain = state[layer_tensor(layer, f"{part}.weight")]
                if (gain - gain[0]).abs().max() > 1e-6:
                    raise ValueError(f"{layer_tensor(layer, part)} has uneven gains: this model has no rotated copy.")
    folds = {FINAL_NORM: [HEAD]}
    for layer in range(shape.n_layers):
        folds[layer_tensor(layer, f"{ATTENTION_NORM}.weight")] = [
            layer_tensor(layer, f"{p}.weight") for p in READERS[:3]
        ]
        folds[layer_tensor(layer, f"{family.mlp_norm}.weight")] = [
            layer_tensor(layer, f"{p}.weight") for p in READERS[3:]
        ]
    for norm, readers in folds.items():
        for name in readers:
            state[name] = state[name] * (state[norm] + offset)
        state[norm] = torch.full_like(state[norm], 1.0 - offset)
    for name in _stream_columns(state, shape):
        state[name] = (state[name].double() @ rotation.T).to(state[name].dtype)
    for layer in range(shape.n_layers):
        for part in WRITERS:
            name = layer_tensor(layer, f"{part}.weight")
            state[name] = (rotation @ state[name].double()).to(state[name].dtype)
    return config, state


def _start(config: PretrainedConfig, state: dict[str, torch.Tensor], untie: bool = False):
    config = copy.deepcopy(config)
    shape = read_structure(config, "this model")
    state = {name: tensor.clone() for name, tensor in state.items() if name != HEAD or not shape.tied}
    if untie and shape.tied:
        state[HEAD] = state[EMBEDDING].clone()
        config.tie_word_embeddings = False
    return config, state, shape


def _stream_columns(state: dict, shape: Structure) -> list[str]:
    names = [EMBEDDING] + ([HEAD] if HEAD in state else [])
    return names + [layer_tensor(i, f"{part}.weight") for i in range(shape.n_layers) for part in READERS]


def _stream_rows(state: dict, shape: Structure) -> list[str]:
    norms = (ATTENTION_NORM, shape.family.mlp_norm, shape.family.attention_post_norm, shape.family.mlp_post_norm)
    parts = [*WRITERS, *(norm for norm in norms if norm is not None)]
    names = [
        FINAL_NORM,
        *(layer_tensor(i, f"{part}.{k}") for i in range(shape.n_layers) for part in parts for k in ("weight", "bias")),
    ]
    return [name for name in names if name in state]


def _head_rows(heads: torch.Tensor, axes: torch.Tensor, shape: Structure) -> torch.Tensor:
    axes = axes.expand(len(heads), -1)
    return (heads[:, None] * shape.head_dim + axes).flatten()


def _take_rows(state: dict, layer: int, parts: tuple[str, ...], index: torch.Tensor) -> None:
    for part in parts:
        for kind in ("weight", "bias"):
            name = layer_tensor(layer, f"{part}.{kind}")
            if name in state:
                state[name] = state[name][index]


def _take_columns(state: dict, layer: int, part: str, index: torch.Tensor) -> None:
    name = layer_tensor(layer, f"{part}.weight")
    state[name] = state[name][:, index]
