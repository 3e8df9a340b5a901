"""Plans of one pair on disk: a versioned safetensors file and its JSON, keyed by the content they were made from."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from mergekit_ot.digest import content_key, file_hash
from mergekit_ot.folders import refuse_foreign, replace_folder, scratch_beside
from mergekit_ot.heads import HeadPlan
from mergekit_ot.maps import DenseMap, SparseMap


FORMAT_VERSION = 1
HEAD_TENSORS = tuple(item.name for item in fields(HeadPlan) if item.name not in ("score", "similarity"))


class BundleError(ValueError):
    """This folder does not hold plans for this pair; the message says what it holds."""


@dataclass
class PlanBundle:
    """All plans of a pair.

    Args:
        tensors (`dict[str, torch.Tensor]`): maps by name.
        info (`dict`): plain JSON: key, settings, structures, layer map, scores, confidence, evidence.
    """

    tensors: dict[str, torch.Tensor]
    info: dict

    @property
    def layer_map(self) -> list[int | None]:
        """Donor layer of every target layer."""
        return self.info["layer_map"]

    def dense(self, name: str) -> DenseMap:
        """A dense map by name."""
        return DenseMap(self.tensors[name])

    def sparse(self, name: str) -> SparseMap:
        """A sparse map by name."""
        return SparseMap(
            self.tensors[f"{name}.index"].long(), self.tensors[f"{name}.weight"], self.info["widths"][name]
        )

    def put_sparse(self, name: str, value: SparseMap) -> None:
        """Store a sparse map."""
        self.tensors[f"{name}.index"] = value.index.int().contiguous()
        self.tensors[f"{name}.weight"] = value.weight.float().contiguous()
        self.info.setdefault("widths", {})[name] = value.n_in

    def heads(self, layer: int) -> HeadPlan:
        """Attention plan of a target layer."""
        stored = {name: self.tensors[f"layers.{layer}.heads.{name}"] for name in HEAD_TENSORS}
        return HeadPlan(**stored, score=float("nan"), similarity=float("nan"))

    def put_heads(self, layer: int, plan: HeadPlan) -> None:
        """Store the attention plan of a target layer."""
        for name in HEAD_TENSORS:
            self.tensors[f"layers.{layer}.heads.{name}"] = getattr(plan, name).contiguous()

    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def save(self, folder: str | Path) -> Path:
        """Write the bundle; the folder appears whole or not at all and replaces an older bundle, nothing else."""
        from safetensors.torch import save_file

        folder = Path(folder)
        refuse_other_plans(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = scratch_beside(folder)
        try:
            save_file({k: v.cpu() for k, v in sorted(self.tensors.items())}, scratch / "plans.safetensors")
            info = {"format_version": FORMAT_VERSION, "sha256": file_hash(scratch / "plans.safetensors")} | self.info
            text = json.dumps(info | {"digest": content_key(info)}, indent=1, sort_keys=True)
            (scratch / "plans.json").write_text(text + "\n")
            replace_folder(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return folder


def refuse_other_plans(folder: Path) -> None:
    """Refuse a folder for plans that holds anything else."""
    refuse_foreign(folder, "plans.json", "an earlier bundle of plans")


def load_bundle(folder: str | Path) -> PlanBundle:
    """Read a bundle.

    Raises:
        [`BundleError`]: when the folder holds none, one of another format version, or one that was changed or damaged
            after it was written.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "plans.json").is_file() or not (folder / "plans.safetensors").is_file():
        raise BundleError(
            f"{folder} holds no plans (plans.json and plans.safetensors); make them with `mergekit-ot plan`."
        )
    damaged = f"{folder} was changed or damaged after it was written; remove it and solve it again."
    try:
        info = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{damaged} (plans.json is no JSON: {error})") from error
    if not isinstance(info, dict):
        raise BundleError(damaged)
    version, digest = info.get("format_version"), info.pop("digest", None)
    if version != FORMAT_VERSION:
        raise BundleError(f"{folder} has plan format {version}, this version reads {FORMAT_VERSION}; solve it again.")
    if digest != content_key(info) or info["sha256"] != file_hash(folder / "plans.safetensors"):
        raise BundleError(damaged)
    del info["format_version"], info["sha256"]
    return PlanBundle(load_file(folder / "plans.safetensors"), info)
