"""Checks on a saved checkpoint: readable before anything is built, complete after everything is loaded."""

from __future__ import annotations

import json
import os
import struct

import torch
from torch import nn

from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.kv_buffers import CacheMeanBuffers
from optimum_freeact.modules.linear import FreeActLinear


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
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            try:
                if length > size - 8:
                    raise ValueError("its header runs past the end of the file")
                header = json.loads(handle.read(length))
                needed = (
                    8
                    + length
                    + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
                )
            except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path!r} has a damaged safetensors header ({error}). Fetch or save it again."
                ) from None
            if needed != size:
                raise ValueError(
                    f"{path!r} has {size} bytes but its header announces {needed}: the file is truncated or damaged. "
                    "Fetch or save it again."
                )


def check_loaded(model: nn.Module) -> None:
    """Every tensor of every quantized module came from the checkpoint.

    transformers leaves tensors that a checkpoint lacks at arbitrary values, with a warning only.

    Raises:
        `ValueError`: naming the first missing tensors.
    """
    missing = []
    for name, module in model.named_modules():
        if isinstance(module, (FreeActLinear, FreeActInput, CacheMeanBuffers)):
            for key, tensor in module.state_dict(keep_vars=True).items():
                if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False):
                    missing.append(f"{name}.{key}")
                elif tensor.is_floating_point() and tensor.device.type != "meta" and not torch.isfinite(tensor).all():
                    raise ValueError(f"The checkpoint's tensor {name}.{key} holds NaN or inf: it is damaged.")
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors of quantized modules, the first are {missing[:3]}. "
            "It is incomplete, or was saved with other settings than its config says."
        )
