"""The extractor and the language means on disk, beside the model and never inside its checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from trl_mlc.extractor import LanguageMeans


WEIGHTS, CONFIG = "mlc_state.safetensors", "mlc_config.json"
FORMAT_VERSION = 1
PREFIX = "extractor."


class SavedState(NamedTuple):
    """Extractor weights, language means (or `None`) and the plain settings they belong to."""

    extractor: dict[str, torch.Tensor]
    means: torch.Tensor | None
    seen: torch.Tensor | None
    config: dict


def _digest(folder: str | Path, config: dict) -> str:
    """Hash of the weights' file and the settings, so that a damaged or mixed pair is not taken for a whole one."""
    settings = json.dumps(config, sort_keys=True).encode()
    return hashlib.sha256((Path(folder) / WEIGHTS).read_bytes() + settings).hexdigest()


def save_state(folder: str | Path, extractor: dict[str, torch.Tensor], means: LanguageMeans | None, config: dict):
    """Write `mlc_state.safetensors` and `mlc_config.json`.

    Args:
        folder (`str` or `Path`): exists.
        extractor (`dict[str, torch.Tensor]`): its state dict, whole tensors; empty without one.
        means ([`LanguageMeans`], *optional*).
        config (`dict`): plain JSON: layer, pooling, languages, widths.
    """
    tensors = {f"{PREFIX}{k}": v.detach().cpu().contiguous() for k, v in extractor.items()}
    if means is not None:
        tensors |= {"means": means.means.cpu().contiguous(), "seen": means.seen.cpu().contiguous()}
    save_file(tensors, Path(folder) / WEIGHTS)
    config = {"format_version": FORMAT_VERSION, **config}
    text = json.dumps(config | {"sha256": _digest(folder, config)}, indent=2, ensure_ascii=False)
    (Path(folder) / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_state(folder: str | Path) -> SavedState:
    """Read what [`save_state`] wrote.

    Raises:
        `ValueError`: if the folder has no MLC state, one of another format, or a damaged one.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS}: it was not written by an MLC trainer, and going on would start the extractor "
            "anew. Resume from an MLC checkpoint, or start from its weights as a model."
        )
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        digest = config.pop("sha256", None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{folder} has a damaged or no {CONFIG} ({error}); resume from another checkpoint."
        ) from error
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has MLC format {config.get('format_version')}, this version reads {FORMAT_VERSION}."
        )
    if digest != _digest(folder, config):
        raise ValueError(
            f"The MLC state in {folder} was damaged or changed after saving; resume from another checkpoint."
        )
    tensors = load_file(path)
    extractor = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    return SavedState(extractor, tensors.get("means"), tensors.get("seen"), config)
