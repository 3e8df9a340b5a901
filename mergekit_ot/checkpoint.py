"""Read tensors of a checkpoint folder one at a time, without building the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mergekit_ot.structure import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Structure,
    UnsupportedModelError,
    layer_tensor,
)


class CheckpointReader:
    """Lazy access to the safetensors files of a folder.

    Args:
        folder (`str | Path`): a checkpoint folder, sharded or not.

    Raises:
        [`UnsupportedModelError`]: when the folder holds no safetensors weights, or a damaged index or file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = self._read_index(index)
        elif (self.folder / "model.safetensors").is_file():
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise UnsupportedModelError(
                f"{folder} holds no model.safetensors; save the model with save_pretrained in this format first."
            )
        self._handles: dict[str, Any] = {}

    @staticmethod
    def _read_index(index: Path) -> dict[str, str]:
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if all(isinstance(name, str) and Path(name).name == name for name in files.values()):
                return dict(files)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise UnsupportedModelError(f"{index} has no weight_map of tensors to files beside it; it is damaged.")

    def _open(self, name: str):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.folder / name, framework="pt")
        except SafetensorError as error:
            raise UnsupportedModelError(
                f"{self.folder / name} is truncated or damaged ({error}); fetch it again."
            ) from None

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.files)

    def __call__(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, or `None`."""
        return None if name not in self.files else self._handle(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the tensor of that name, read from the file's header, or `None`."""
        return None if name not in self.files else tuple(self._handle(name).get_slice(name).get_shape())

    def _handle(self, name: str):
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = self._open(file)
            if absent := {n for n, f in self.files.items() if f == file} - set(self._handles[file].keys()):
                raise UnsupportedModelError(
                    f"{self.folder / file} lacks {sorted(absent)[0]}, which the index promises."
                )
        return self._handles[file]


def check_tensors(folder: str | Path, model: Structure) -> None:
    """Refuse a checkpoint whose files lack a weight that its config announces, or hold it in another shape.

    Raises:
        [`UnsupportedModelError`]: naming the first such tensor.
    """
    reader = CheckpointReader(folder)
    for name, shape in expected_shapes(model).items():
        found = reader.shape(name)
        if found != shape:
            held = "is missing" if found is None else f"has shape {found}"
            raise UnsupportedModelError(
                f"{folder}: {name} {held}, config.json announces {shape}; files and config do not belong together."
            )


def expected_shapes(model: Structure) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of this structure holds; optional biases are left out."""
    width, heads, groups = model.width, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    family = model.family
    norms = [ATTENTION_NORM, family.mlp_norm, family.attention_post_norm, family.mlp_post_norm]
    layer = {f"{norm}.weight": (width,) for norm in norms if norm is not None} | {
        "self_attn.q_proj.weight": (heads, width),
        "self_attn.k_proj.weight": (groups, width),
        "self_attn.v_proj.weight": (groups, width),
        "self_attn.o_proj.weight": (width, heads),
        "mlp.gate_proj.weight": (model.mlp_width, width),
        "mlp.up_proj.weight": (model.mlp_width, width),
        "mlp.down_proj.weight": (width, model.mlp_width),
    }
    if family.qk_norm:
        layer |= {f"self_attn.{side}_norm.weight": (model.head_dim,) for side in "qk"}
    outer = {EMBEDDING: (model.vocab_size, width), FINAL_NORM: (width,)}
    outer |= {} if model.tied else {HEAD: (model.vocab_size, width)}
    return outer | {layer_tensor(i, part): shape for i in range(model.n_layers) for part, shape in layer.items()}
