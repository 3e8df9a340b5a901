"""Read tensors of a checkpoint folder one at a time, without building the model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mergekit_ot.structure import UnsupportedModelError


class CheckpointReader:
    """Lazy access to the safetensors files of a folder.

    Args:
        folder (`str | Path`): a checkpoint folder, sharded or not.

    Raises:
        [`UnsupportedModelError`]: when the folder holds no safetensors weights.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = dict(json.loads(index.read_text())["weight_map"])
        elif (self.folder / "model.safetensors").is_file():
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise UnsupportedModelError(
                f"{folder} holds no model.safetensors; save the model with save_pretrained in this format first."
            )
        self._handles: dict[str, object] = {}

    def _open(self, name: str):
        from safetensors import safe_open

        return safe_open(self.folder / name, framework="pt")

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.files)

    def __call__(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, or `None`."""
        file = self.files.get(name)
        if file is None:
            return None
        if file not in self._handles:
            self._handles[file] = self._open(file)
        return self._handles[file].get_tensor(name)
