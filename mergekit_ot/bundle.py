"""Plans of one pair on disk: a versioned safetensors file and its JSON, keyed by the content they were made from."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch

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
        """Write the bundle; the folder appears whole or not at all and replaces an older bundle."""
        from safetensors.torch import save_file

        folder = Path(folder)
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


def scratch_beside(folder: Path) -> Path:
    """A new hidden folder beside `folder`; those that a killed process of this machine left there are removed.

    Its name says the machine and the process, so that a folder in use by another run is never taken for a left one.
    """
    mine = f".{folder.name}-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{glob.escape(mine)}*"):
        process = left.name.removeprefix(mine).partition("-")[0]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=folder.parent))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's
        return True
    return True


def replace_folder(scratch: Path, folder: Path) -> None:
    """Move a finished folder to its place, over an older one of the same kind."""
    old = folder.with_name(f".{folder.name}-old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # what an interrupted replacement left
        os.replace(folder, old)
    os.replace(scratch, folder)
    os.chmod(folder, 0o755)
    shutil.rmtree(old, ignore_errors=True)


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


def file_hash(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as handle:
        return (
            hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)
        )


def _digest(handle) -> str:
    digest = hashlib.sha256()
    while piece := handle.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def model_hash(folder: str | Path) -> str:
    """Hash of a checkpoint's content: config, weights and tokenizer, by file name and sha256."""
    names = [
        path for pattern in ("config.json", "*.safetensors", "tokenizer.json") for path in Path(folder).glob(pattern)
    ]
    return content_key({path.name: file_hash(path) for path in names})


def content_key(value: dict) -> str:
    """Hash of plain JSON, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
