"""The verbs on a model that is in memory: quantize it, save it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from optimum_freeact.commands.folder import new_folder
from optimum_freeact.config import FreeActConfig
from optimum_freeact.hf.quantizer import FreeActHfQuantizer
from optimum_freeact.hf.saving import failed
from optimum_freeact.modules.surgery import quantized_linears


def quantize(model: nn.Module, config: FreeActConfig) -> nn.Module:
    """Quantize a loaded full-precision model in place; for models that did not come through `from_pretrained`.

    Args:
        model: A transformers decoder model.
        config ([`FreeActConfig`]): Settings with `dataset`.

    Returns:
        The same model, with `save_pretrained` and `dequantize` as after `from_pretrained`.

    Raises:
        `ValueError`: for a model that is quantized already, and for all that [`FreeActConfig`] and calibration refuse.
    """
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is no model of transformers: its config says how it is built.")
    present = getattr(model.config, "quantization_config", None)
    if present is not None or quantized_linears(model):
        raise ValueError(
            f"The model is quantized already ({type(present).__name__}): load it in full precision first."
        )
    quantizer = FreeActHfQuantizer(config, pre_quantized=False)
    quantizer.validate_environment()
    quantizer.preprocess_model(model)
    model.hf_quantizer = quantizer
    try:
        quantizer.postprocess_model(model)
    except Exception:
        if not quantized_linears(model):  # refused before anything was changed: it may be tried again
            quantizer.remove_quantization_config(model)
        raise
    return model


def save(model: nn.Module, folder: str | os.PathLike, tokenizer: Any = None, *, overwrite: bool = False) -> Path:
    """Save a model so that the folder appears whole or not at all.

    A quantized model's `save_pretrained` sees to its own files; here the tokenizer's are included, an existing folder is
    kept unless `overwrite` is set, and any other model is saved so too.

    Args:
        model: A quantized model (or any other with `save_pretrained`).
        folder (`str` or `os.PathLike`): Must not exist or be empty.
        tokenizer (*optional*): Saved with it.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an existing folder.

    Returns:
        `pathlib.Path` of the folder.

    Raises:
        `FileExistsError`: if the folder holds something and `overwrite` is not set.
        `OSError`: if writing fails; nothing is left, and a folder that was to be overwritten is as it was.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise FileExistsError(
            f"{str(folder)!r} exists already: name a new folder, or pass overwrite=True for a folder."
        )
    try:
        with new_folder(folder) as fresh:
            type(model).save_pretrained(model, fresh)
            if tokenizer is not None:
                tokenizer.save_pretrained(fresh)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own error
        raise failed(model, folder, error) from error
    return folder
