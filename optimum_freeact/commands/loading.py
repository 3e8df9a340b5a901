"""Models, tokenizers and texts as a command line names them, each refused early and in one line when it cannot be."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from optimum_freeact.calibration.data import load_samples, read_data
from optimum_freeact.calibration.pictured import is_pictured
from optimum_freeact.config import FreeActConfig
from optimum_freeact.hf.auto import auto_class
from optimum_freeact.hf.serialization import check_checkpoint, check_index
from optimum_freeact.models.loaders import loader_of
from optimum_freeact.report.evaluate import TextScore, score_text, tokenize_windows
from optimum_freeact.report.evaluate_masked import hide_tokens, score_masked
from optimum_freeact.type_rules import field_value


HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def console() -> Console:
    """Where tables go: the terminal as it is, or lines wide enough for a file."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def model_name(model: str) -> str:
    """How reports call a model: the name on the hub, or the folder's own name without its place on this machine."""
    return Path(os.path.abspath(model)).name if os.path.isdir(model) else model


def pick_device(name: str | None) -> torch.device:
    """The named device, or `cuda` where there is one.

    Raises:
        `ValueError`: for a device that torch does not know or that is not here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype | str:
    """The named dtype; by default the checkpoint's on a GPU and float32 on a CPU, where half precision is slow."""
    if name is None:
        return torch.float32 if device.type == "cpu" else "auto"
    return name if name == "auto" else getattr(torch, name)


def load_config(model: str) -> PretrainedConfig:
    """The model's config; the headers of its files are checked on the way. Models that this package has a loader for are known then.

    Raises:
        `ValueError`: for a path that is no folder or holds no whole model, and a name that the hub does not give.
    """
    if not os.path.isdir(model) and not HUB_NAME.fullmatch(model):
        raise ValueError(f"{model!r} is neither a folder here nor a model's name on the hub.")
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "config.json")):
        raise ValueError(f"{model!r} holds no config.json: it is no model saved by save_pretrained.")
    check_index(Path(model) / "model.safetensors.index.json")
    check_checkpoint([str(path) for path in sorted(Path(model).glob("*.safetensors"))])
    try:
        loader = loader_of(PretrainedConfig.get_config_dict(model)[0].get("model_type"))
        if loader is not None:
            import_module(loader)
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        if os.path.isdir(model):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"{model!r} is no folder here, and the hub did not give such a model ({reason}).") from error


def quantization_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantization that a checkpoint was saved with, as a dictionary."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def check_full_precision(model: str, config: PretrainedConfig) -> None:
    """Refuse a model that is quantized already.

    Raises:
        `ValueError`: naming its method.
    """
    found = quantization_of(config)
    if found is not None:
        method = found.get("quant_method")
        raise ValueError(f"{model!r} is quantized already ({method}): name the full-precision model.")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or a name on the hub.

    Raises:
        `ValueError`: if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # what transformers raises for a folder without one
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"No tokenizer could be loaded from {name!r} ({reason}); pass --tokenizer.") from error


# what AutoProcessor reads beside a tokenizer's files: how pictures, films and sound become inputs
PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)


def copy_processor(model: str, folder: Path) -> None:
    """Copy into `folder` what a model has of a processor, so that what is made of it reads pictures as it did. Nothing is loaded: a
    processor may need packages that quantizing does not.
    """
    for name in PROCESSOR_FILES:
        found = cached_file(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found is not None:
            shutil.copyfile(found, folder / name)


def load_calibration(
    dataset: str, tokenizer: Any, config: FreeActConfig, vocab_size: int, model: str
) -> torch.Tensor | list[dict]:
    """Calibration windows, or inputs with pictures as the model's processor makes them, read before the weights so that bad data is
    known early. Errors name the data.
    """
    try:
        data = read_data(dataset, config.n_samples, config.seq_len)
        reader = load_processor(model) if is_pictured(data) else tokenizer
        return load_samples(data, reader, config.n_samples, config.seq_len, config.seed, vocab_size)
    except UnicodeDecodeError as error:
        raise ValueError(f"{dataset!r} is no UTF-8 text ({error.reason} at byte {error.start}).") from None


def load_processor(model: str) -> Any:
    """The model's processor.

    Raises:
        `ValueError`: if it has none, or one that needs what is not installed.
    """
    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(
            f"The calibration rows have pictures, and no processor could be loaded from {model!r} ({reason})."
        ) from error


def load_windows(text: str, tokenizer: Any, window: int, tokens: int, config: PretrainedConfig) -> torch.Tensor:
    """Evaluation windows `(n, window)` with as many of `tokens` as fill whole windows.

    Raises:
        `ValueError`: for a file that is no text, sizes that do not fit each other or the model, or too little text.
    """
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"--text {text!r} is no file here; evaluation reads a plain text file.")
    if window < 2 or tokens < window:
        raise ValueError(f"--window must be at least 2 and --tokens at least --window, got {window} and {tokens}.")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise ValueError(f"--window {window} is longer than the model's {positions} positions.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text!r} is no UTF-8 text ({error.reason} at byte {error.start}).") from None
    return tokenize_windows(content, tokenizer, window, tokens // window)


def load_model(model: str, dtype: torch.dtype | str, device: torch.device) -> nn.Module:
    """A causal language model in eval mode on `device`.

    Raises:
        `ValueError`: if weights are missing or of another shape than the config says, naming the first;
            transformers alone would use random ones for those that are missing.
    """
    loaded, info = auto_class(load_config(model)).from_pretrained(
        model, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for what, found in (("lacks", info["missing_keys"]), ("has other shapes in", info["mismatched_keys"])):
        names = sorted(item if isinstance(item, str) else item[0] for item in found)
        if names:
            raise ValueError(
                f"{model!r} {what} {len(names)} of the weights that its config.json announces, the first are "
                f"{names[:3]}: files and config do not belong together, or are damaged."
            )
    return loaded.to(device).eval()


def is_masked(config: PretrainedConfig) -> bool:
    """Whether a config is that of a masked-diffusion model, which fills in hidden tokens and gives none that follow."""
    return field_value(config, "mask_token_id") is not None


def score(model: nn.Module, windows: torch.Tensor, label: str, progress: bool) -> TextScore:
    """Score a text window by window under a progress bar: its likelihood, or that of hidden tokens for a masked-diffusion model."""
    mask_id = field_value(model.config, "mask_token_id")
    hidden = None if mask_id is None else hide_tokens(windows, mask_id)
    total, count = 0.0, 0
    bar = tqdm(range(len(windows)), desc=label, unit="window", disable=not progress)
    for index in bar:
        window = windows[index : index + 1]
        part = score_text(model, window) if hidden is None else score_masked(model, window, hidden[index : index + 1])
        total, count = total + part.nll * part.n_tokens, count + part.n_tokens
        bar.set_postfix(nll=f"{total / count:.4f}", refresh=False)
    return TextScore(total / count, math.exp(min(total / count, 700.0)), count)


def machine() -> dict[str, str]:
    """What ran here, for the reports."""
    gpu = f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "processor": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
