"""Weights as a second witness beside activations.

Fine-tuning changes weights by a few percent but can change activations a lot, and neurons that the calibration text never
wakes have no activations to speak of. Read in the target's basis, the weights of a relative identify its neurons and
value axes beyond doubt; between unrelated models these similarities are noise of size 1/√width and decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mergekit_ot.confidence import random_like
from mergekit_ot.procrustes import MapPair
from mergekit_ot.structure import ATTENTION_NORM, Structure, layer_tensor


#: Reads a checkpoint tensor by name; `None` when the checkpoint has none of that name.
Reader = Callable[[str], torch.Tensor | None]


def needed(tensor: torch.Tensor | None, name: str) -> torch.Tensor:
    """The tensor; a checkpoint that lacks it is refused.

    Raises:
        `ValueError`: naming it.
    """
    if tensor is None:
        raise ValueError(f"The checkpoint has no tensor {name!r}.")
    return tensor


@dataclass(frozen=True)
class Witness:
    """Access to both models' weights in the target's stream basis.

    Args:
        read_target, read_donor (`Callable[[str], torch.Tensor | None]`): tensors by checkpoint name.
        target, donor ([`Structure`]): shapes.
        stream ([`MapPair`]): the stream map.
        device (`str`): where to compute.
    """

    read_target: Reader
    read_donor: Reader
    target: Structure
    donor: Structure
    stream: MapPair
    device: str = "cpu"

    def _tensor(self, side: str, layer: int, part: str) -> torch.Tensor:
        read = self.read_target if side == "target" else self.read_donor
        name = layer_tensor(layer, part)
        return needed(read(name), name).to(self.device).float()

    def _readers(self, side: str, layer: int, part: str, norm: str) -> torch.Tensor:
        """Rows of a reading weight with its norm's gain folded, in the target's stream basis."""
        shape = self.target if side == "target" else self.donor
        gain = self._tensor(side, layer, f"{norm}.weight") + shape.family.norm_offset
        rows = self._tensor(side, layer, f"{part}.weight") * gain
        return rows if side == "target" else rows @ self.stream.to_donor.to(rows)

    def _writers(self, side: str, layer: int, part: str) -> torch.Tensor:
        """Columns of a writing weight, as rows, in the target's stream basis."""
        weight = self._tensor(side, layer, f"{part}.weight")
        return (weight if side == "target" else self.stream.to_target.to(weight) @ weight).T

    def neurons(self, i: int, j: int) -> torch.Tensor:
        """Mean cosine of gate, up and down vectors, `(neurons_target, neurons_donor)`."""
        norms = self.target.family.mlp_norm, self.donor.family.mlp_norm
        total = 0.0
        for part in ("mlp.gate_proj", "mlp.up_proj"):
            rows = self._readers("target", i, part, norms[0]), self._readers("donor", j, part, norms[1])
            total = total + _cosines(*rows)
        return (
            total + _cosines(self._writers("target", i, "mlp.down_proj"), self._writers("donor", j, "mlp.down_proj"))
        ) / 3

    def values(self, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Value weights in the target's basis: `(groups * head_dim, width_target)` of target and donor."""
        return (
            self._readers("target", i, "self_attn.v_proj", ATTENTION_NORM),
            self._readers("donor", j, "self_attn.v_proj", ATTENTION_NORM),
        )

    def _null_input(self, j: int, stream: torch.Tensor, norm: str) -> torch.Tensor:
        rows = stream / stream.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        return rows * (self._tensor("donor", j, f"{norm}.weight") + self.donor.family.norm_offset)

    def null_neurons(self, j: int, stream: torch.Tensor, draw: int) -> torch.Tensor:
        """Neurons of donor layer `j` on the donor's own stream, with random weights, `(n_rows, neurons_donor)`.

        Args:
            stream (`torch.Tensor` of shape `(n_rows, width_donor)`): the donor's stream between attention and MLP.
            draw (`int`): number of the draw.
        """
        from transformers.activations import ACT2FN

        rows = self._null_input(j, stream, self.donor.family.mlp_norm)
        gate, up = (
            rows @ random_like(self._tensor("donor", j, f"mlp.{part}_proj.weight"), 3 * draw + seed).T
            for seed, part in enumerate(("gate", "up"))
        )
        return ACT2FN[self.donor.activation](gate) * up

    def null_values(self, j: int, stream: torch.Tensor, draw: int) -> torch.Tensor:
        """Values of donor layer `j` on the donor's own stream, with random weights, `(n_rows, groups * head_dim)`.

        Args:
            stream (`torch.Tensor` of shape `(n_rows, width_donor)`): the donor's stream before attention.
            draw (`int`): number of the draw.
        """
        rows = self._null_input(j, stream, ATTENTION_NORM)
        return rows @ random_like(self._tensor("donor", j, "self_attn.v_proj.weight"), 3 * draw + 2).T


def _cosines(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T
