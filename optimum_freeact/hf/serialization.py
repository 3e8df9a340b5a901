"""Checks on a saved checkpoint: readable before anything is built, complete after everything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.embeddings import FreeActEmbedding, FreeActHead
from optimum_freeact.modules.experts import FreeActExperts
from optimum_freeact.modules.kv_buffers import NAME as CACHE_NAME
from optimum_freeact.modules.kv_buffers import CacheMeanBuffers
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.numerics.finite import all_finite


def check_checkpoint(files: list[str] | None) -> dict[str, str]:
    """Refuse files that are no whole safetensors, before the model is built; returns names and types of their tensors.

    Raises:
        `ValueError`: for a pickle, an unreadable header, or a file shorter than its header says; names the file.
    """
    names: dict[str, str] = {}
    for path in files or []:
        path = os.fspath(path)
        if not path.endswith(".safetensors"):
            raise ValueError(
                f"{path!r} is not a safetensors file. FreeAct checkpoints are never pickled; re-save the model with "
                "save_pretrained."
            )
        try:
            with safe_open(path, "pt") as file:  # opening checks the whole header: types, shapes, offsets, file size
                names |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path!r} ({os.path.getsize(path)} bytes) is truncated or damaged ({error}). Fetch or save it again."
            ) from None
    return names


def check_index(path: Path) -> None:
    """Refuse the index of a checkpoint in several files if it is damaged or names files that are not there.

    Raises:
        `ValueError`: naming the index or the missing files.
    """
    if not path.is_file():
        return
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is truncated or damaged ({type(error).__name__}: {error}). Fetch or save it again."
        ) from None
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(f"{str(path)!r} names {missing[:3]}, which are not there: fetch or save the model again.")


#: Types as safetensors names them.
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
    torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


KINDS = (FreeActLinear, FreeActInput, FreeActExperts, CacheMeanBuffers, FreeActEmbedding, FreeActHead)
PUBLISHED = {".block_sparse_moe.": ".mlp."}  # what transformers renames when it loads, in families with experts
FLOATING = ("F64", "F32", "F16", "BF16")


def check_names(model: nn.Module, names: dict[str, str]) -> None:
    """Refuse a checkpoint with parts of quantized modules that the config does not ask for, or of another type.

    transformers would leave them out with a warning, or convert them, and the layer would compute something else.

    Raises:
        `ValueError`: naming the first of them.
    """
    known: dict[str, set[str]] = {CACHE_NAME: set()}
    wanted: dict[str, set[str]] = {}
    types: dict[str, str] = {}
    by_key: dict[str, set[str]] = {}  # for names that transformers or a loader maps to its own
    prefix = getattr(model, "base_model_prefix", "")
    for name, module in model.named_modules():
        if isinstance(module, KINDS):
            leaf = name.rpartition(".")[2]
            known.setdefault(leaf, set()).update(module._buffers)
            wanted.setdefault(leaf, set()).update(k for k, tensor in module._buffers.items() if tensor is not None)
            for key, tensor in {**module._parameters, **module._buffers}.items():
                if (
                    tensor is not None
                ):  # a checkpoint of the whole model may be loaded into its inner one, and vice versa
                    own = f"{name}.{key}"
                    by_key.setdefault(key, set()).add(TYPES[tensor.dtype])
                    types |= dict.fromkeys(
                        (own, f"{prefix}.{own}", own.removeprefix(f"{prefix}.")), TYPES[tensor.dtype]
                    )
    stray, wrong = [], []
    for name, found in names.items():
        for published, own in PUBLISHED.items():
            name = name.replace(published, own)
        parent, _, leaf = name.rpartition(".")
        parent = parent.rpartition(".")[2]
        ours = leaf in known.get(parent, ()) or parent == CACHE_NAME
        if ours and leaf not in wanted.get(parent, ()):
            stray.append(name)
        elif found != types.get(name, found) or not (
            name in types or found in FLOATING or ours or found in by_key.get(leaf, ())
        ):
            wrong.append(f"{name} ({found})")
    if stray:
        raise ValueError(
            f"{len(stray)} tensors of the checkpoint do not belong to a model of its quantization_config, the first are "
            f"{stray[:3]}: the config was changed after saving. Restore it, or fetch or save the model again."
        )
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors of the checkpoint have types that they cannot have been saved with, the first are "
            f"{wrong[:3]}: the file is damaged, or not of this model. Fetch or save it again."
        )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of quantized modules, before anything is loaded: as the config asks for."""
    kinds = (FreeActLinear, FreeActInput, CacheMeanBuffers, FreeActEmbedding, FreeActHead)
    return {
        f"{name}.{key}": tuple(tensor.shape)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for key, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None
    }


def check_loaded(model: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    """Every tensor that this model and its checkpoint have in common came from the checkpoint, fits, and is finite.

    transformers before 5.22 takes tensors of any shape into a quantized model, hence `expected`, from [`shapes_of`].

    transformers initialises what a checkpoint lacks, with a warning only. That is right for the new head of another
    task, and for nothing else: a checkpoint of this very class must hold everything.

    Raises:
        `ValueError`: naming the first missing tensors, or those of another shape.
    """
    found = shapes_of(model)
    other = [
        f"{name} {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
    ]
    if other:
        raise ValueError(
            f"{len(other)} tensors of the checkpoint mismatch its quantization_config, the first are {other[:3]}: the config "
            "was changed after saving. Restore it, or fetch or save the model again."
        )
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    inner = model if same_class else getattr(model, "base_model", model)
    missing = []
    for name, tensor in inner.state_dict(keep_vars=True).items():
        if tensor.device.type == "meta":  # offloaded: read from the checkpoint later
            continue
        if not getattr(tensor, "_is_hf_initialized", False):
            missing.append(name)
        elif tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"The checkpoint's tensor {name!r} holds NaN or inf: it is damaged.")
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors, the first are {missing[:3]}. It is incomplete or damaged, or was "
            "saved with other settings than its config says."
        )
