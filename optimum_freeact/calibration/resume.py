"""Finished blocks on disk, so that an interrupted calibration goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from optimum_freeact.calibration.prepared import digest as samples_digest
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.experts import FreeActExperts
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.numerics.finite import all_finite


def fingerprint(config: FreeActConfig, samples: torch.Tensor, model: nn.Module) -> str:
    """Hash of everything that a block's result depends on: settings, calibration ids, and the weights' sums."""
    settings = {k: v for k, v in config.to_dict().items() if k not in ("input_groups", "calibration_record")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(samples_digest(samples))
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{float(parameter.detach().double().sum()):.17g}".encode())
    return digest.hexdigest()


class BlockStore:
    """A folder with one safetensors file per finished block and the fingerprint of the run.

    Raises:
        `ValueError`: if the folder belongs to another run.
    """

    def __init__(self, config: FreeActConfig, samples: torch.Tensor, model: nn.Module):
        self.folder = Path(config.resume_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark, path = fingerprint(config, samples, model), self.folder / "fingerprint.txt"
        if path.exists() and path.read_text() != mark:
            raise ValueError(
                f"resume_dir={str(self.folder)!r} holds blocks of another model, calibration set or config. "
                "Delete it or name another folder."
            )
        path.write_text(mark)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def load(self, index: int) -> dict[str, torch.Tensor] | None:
        """Tensors of a finished block, or `None`.

        Raises:
            `ValueError`: naming the file, if it is damaged.
        """
        path = self._path(index)
        try:
            return load_file(path) if path.exists() else None
        except SafetensorError as error:
            raise damaged(path, error) from None

    def save(self, index: int, block: nn.Module) -> None:
        """Write a block's quantized tensors; the file appears whole or not at all."""
        tensors = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, module in block.named_modules()
            if isinstance(module, (FreeActLinear, FreeActInput, FreeActExperts))
            for key, value in _own(module).items()
        }
        partial = self._path(index).with_suffix(".partial")
        save_file(tensors, partial)
        partial.rename(self._path(index))

    def restore(self, index: int, block: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Fill a block's empty quantized modules.

        Raises:
            `ValueError`: naming the file, if it holds other tensors than the block has, or such that are not finite.
        """
        try:
            self._fill(block, tensors)
        except RuntimeError as error:
            raise damaged(self._path(index), error) from None
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise damaged(self._path(index), f"{name!r} holds NaN or inf")

    @staticmethod
    def _fill(block: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        for name, module in block.named_modules():
            if isinstance(module, (FreeActLinear, FreeActInput, FreeActExperts)):
                own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.rpartition(".")[0] == name}
                if isinstance(module, FreeActExperts):  # its inputs are modules of their own
                    own |= {k: v for k, v in module.state_dict().items() if "." in k}
                module.load_state_dict(own)


def damaged(path: Path, why: object) -> ValueError:
    """What to raise for a block's file that cannot be used."""
    return ValueError(
        f"The finished block {str(path)!r} is damaged ({' '.join(str(why).split())}). Delete this file: the block is "
        "calibrated again, the others are kept."
    )


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """A quantized module's tensors without those of modules inside it."""
    return module.own_tensors() if isinstance(module, FreeActExperts) else module.state_dict()
