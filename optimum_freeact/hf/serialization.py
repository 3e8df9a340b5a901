"""Checks on a saved checkpoint: readable before anything is built, complete after everything is loaded."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def check_checkpoint(files: list[str] | None) -> None:
    """Refuse files that are no whole safetensors, before the model is built.

    Raises:
        `ValueError`: for a pickle, an unreadable header, or a file shorter than its header says; names the file.
    """
    for path in files or []:
        path = os.fspath(path)
        if not path.endswith(".safetensors"):
            raise ValueError(
                f"{path!r} is not a safetensors file. FreeAct checkpoints are never pickled; re-save the model with "
                "save_pretrained."
            )
        try:
            with safe_open(path, "pt"):
                pass  # opening checks the whole header: names, types, shapes, offsets, and the file's size
        except SafetensorError as error:
            raise ValueError(
                f"{path!r} ({os.path.getsize(path)} bytes) is truncated or damaged ({error}). Fetch or save it again."
            ) from None


def check_loaded(model: nn.Module) -> None:
    """Every tensor that this model and its checkpoint have in common came from the checkpoint, and is finite.

    transformers initialises what a checkpoint lacks, with a warning only. That is right for the new head of another
    task, and for nothing else: a checkpoint of this very class must hold everything.

    Raises:
        `ValueError`: naming the first missing tensors.
    """
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    inner = model if same_class else getattr(model, "base_model", model)
    missing = []
    for name, tensor in inner.state_dict(keep_vars=True).items():
        if tensor.device.type == "meta":  # offloaded: read from the checkpoint later
            continue
        if not getattr(tensor, "_is_hf_initialized", False):
            missing.append(name)
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"The checkpoint's tensor {name!r} holds NaN or inf: it is damaged.")
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors, the first are {missing[:3]}. It is incomplete or damaged, or was "
            "saved with other settings than its config says."
        )
