"""One target tensor at a time: what the donor's matching weights become in the target's channels.

Norm gains are folded on the fly. A reader behind a norm computes `W diag(γ) z` of the normalised stream z, so the donor's
gain goes in before the stream map and the target's is divided out after it; the target keeps its own norms. Writers
carry the ratio of the two streams' scales.
"""

from __future__ import annotations

import torch

from mergekit_ot.bundle import PlanBundle
from mergekit_ot.heads import HeadPlan
from mergekit_ot.paper import paper_weight
from mergekit_ot.structure import ATTENTION_NORM, EMBEDDING, FINAL_NORM, HEAD, Structure, layer_tensor, split_name
from mergekit_ot.witness import Reader, needed


#: Gains below this share of the typical one cannot be divided out; the target keeps its weights there.
SMALL_GAIN = 1e-3


class Transporter:
    """Produces transported weights for a pair.

    Args:
        bundle ([`PlanBundle`]): plans.
        target, donor ([`Structure`]): shapes.
        read_target, read_donor (`Callable[[str], torch.Tensor | None]`): lazy tensor access.
    """

    def __init__(
        self, bundle: PlanBundle, target: Structure, donor: Structure, read_target: Reader, read_donor: Reader
    ):
        self.bundle, self.a, self.b = bundle, target, donor
        self.read_target, self.read_donor = read_target, read_donor
        self.attention = "attn" in bundle.info["settings"]["modules"]
        self.mlp = "mlp" in bundle.info["settings"]["modules"]

    def transport(self, name: str, target: torch.Tensor) -> torch.Tensor | None:
        """Return the transported tensor for a target tensor, or `None` where the target keeps its own.

        Args:
            name (`str`): checkpoint name, e.g. `"model.layers.3.mlp.up_proj.weight"`.
            target (`torch.Tensor`): the target's tensor of that name.

        Returns:
            `torch.Tensor` of the target's shape, in float32 or wider, on the target's device.
        """
        place = split_name(name)
        if self.bundle.info["kind"] == "paper":
            return paper_weight(self.bundle, name, target)
        if name in (EMBEDDING, HEAD) and "tokens.target" in self.bundle.tensors:
            return self._vocabulary(name, target)
        if place is None or self.bundle.layer_map[place[0]] is None:
            return None
        layer, part = place
        module, _, kind = part.rpartition(".")
        makers = {
            "self_attn.q_proj": self._query_or_key,
            "self_attn.k_proj": self._query_or_key,
            "self_attn.v_proj": self._value,
            "self_attn.o_proj": self._output,
            "mlp.gate_proj": self._up,
            "mlp.up_proj": self._up,
            "mlp.down_proj": self._down,
        }
        wanted = self.attention if module.startswith("self_attn") else self.mlp
        if module not in makers or not wanted:
            return None
        if kind == "bias" and module in ("self_attn.o_proj", "mlp.down_proj"):
            return None
        made = makers[module](layer, module, kind, target)
        if made is None or module in ("self_attn.o_proj", "mlp.down_proj") or kind == "bias":
            return made
        return self._read(made, layer, target, module)

    def reader_vectors(self, layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Vectors with which a reading weight of both models reads the normalised stream, row by matched row.

        Args:
            layer (`int`): target layer.
            module (`str`): e.g. `"mlp.up_proj"`.

        Returns:
            Target vectors `(n, width_target)` and donor vectors `(n, width_donor)`, or `None` where nothing is matched.
        """
        maker = (
            self._up if module.startswith("mlp") else self._value if module.endswith("v_proj") else self._query_or_key
        )
        target = self._target(layer, f"{module}.weight").float()
        rows = maker(layer, module, "weight", target)
        if rows is None:
            return None
        gains = [self._gain(side, layer, f"{norm}.weight", target) for side, norm in self._norms(module)]
        return target * gains[0], rows * gains[1]

    # --- tensors of the donor -------------------------------------------------------------------------------------
    def _donor(self, layer: int, part: str, like: torch.Tensor) -> torch.Tensor | None:
        place = self.bundle.layer_map[layer]
        tensor = None if place is None else self.read_donor(layer_tensor(place, part))
        return None if tensor is None else tensor.to(device=like.device, dtype=_wide(like))

    def _donor_weight(self, layer: int, part: str, like: torch.Tensor) -> torch.Tensor:
        return needed(self._donor(layer, part, like), f"{part} of the donor layer for target layer {layer}")

    def _target(self, layer: int, part: str) -> torch.Tensor:
        name = layer_tensor(layer, part)
        return needed(self.read_target(name), name)

    def _gain(self, side: str, layer: int, part: str, like: torch.Tensor) -> torch.Tensor:
        """Norm gain as a factor, `(width,)`."""
        if side == "donor":
            return self._donor_weight(layer, part, like) + self.b.family.norm_offset
        return self._target(layer, part).to(like.device, _wide(like)) + self.a.family.norm_offset

    # --- the two sides of a weight --------------------------------------------------------------------------------
    def _norms(self, module: str) -> tuple[tuple[str, str], tuple[str, str]]:
        """Sides and names of the norms that a reading weight reads through."""
        if module.startswith("self_attn"):
            return ("target", ATTENTION_NORM), ("donor", ATTENTION_NORM)
        return ("target", self.a.family.mlp_norm), ("donor", self.b.family.mlp_norm)

    def _read(self, rows: torch.Tensor, layer: int, target: torch.Tensor, module: str) -> torch.Tensor:
        """Carry the input side through the stream map and both norms; `rows` is `(n_out_target, width_donor)`."""
        gain_a, gain_b = (self._gain(side, layer, f"{norm}.weight", target) for side, norm in self._norms(module))
        mapped = self.bundle.dense("residual.to_donor").right(rows * gain_b)
        small = gain_a.abs() < SMALL_GAIN * gain_a.abs().median()
        mapped = mapped / torch.where(small, torch.ones_like(gain_a), gain_a)
        return torch.where(small, target.to(mapped), mapped)

    def _write(
        self, columns: torch.Tensor, layer: int, target: torch.Tensor, norms: tuple[str | None, str | None]
    ) -> torch.Tensor:
        """Carry the output side through the stream map; `columns` is `(width_donor, n_in_target)`."""
        if norms[1] is not None:
            columns = columns * self._gain("donor", layer, f"{norms[1]}.weight", target)[:, None]
        mapped = self.bundle.dense("residual.to_target").left(columns)
        if norms[0] is not None:
            gain = self._gain("target", layer, f"{norms[0]}.weight", target)
            small = gain.abs() < SMALL_GAIN * gain.abs().median()
            mapped = mapped / torch.where(small, torch.ones_like(gain), gain)[:, None]
            mapped = torch.where(small[:, None], target.to(mapped), mapped)
        if (norms[0] is None) != (norms[1] is None):  # a norm on one side only erases the scale: take the target's
            return mapped * (target.to(mapped).norm() / mapped.norm().clamp_min(1e-30))
        return mapped if norms[0] is not None else mapped * self.bundle.info["stream_scale"][str(layer)]

    # --- attention ------------------------------------------------------------------------------------------------
    def _query_or_key(self, layer: int, module: str, kind: str, target: torch.Tensor) -> torch.Tensor | None:
        if self.a.family.qk_norm != self.b.family.qk_norm:
            return None  # a per-head norm on one side only: scores of the two models are not on one scale
        plan, which = self.bundle.heads(layer), module[-6]  # "q" or "k"
        rows = self._donor(layer, f"{module}.{kind}", target)
        if rows is None:
            return torch.zeros_like(target, dtype=_wide(target)) if kind == "bias" else None
        pick = plan.pick if which == "q" else plan.group_pick
        width = rows.shape[1] if rows.ndim == 2 else 1  # a bias is one column
        rows = rows.reshape(-1, self.b.head_dim, width)[pick.to(rows.device)]  # (heads, head_dim_donor, width)
        gains = None
        if self.a.family.qk_norm:
            gains = tuple(
                self._gain(side, layer, f"self_attn.{which}_norm.weight", target) for side in ("target", "donor")
            )
            rows = rows * gains[1][None, :, None]
        phase = plan.phase.repeat_interleave(self.a.group, dim=0) if which == "q" else plan.phase
        rows = _rotate_pairs(rows, plan.pairs.to(rows.device), phase.to(rows))
        if gains is not None:
            rows = rows / gains[0][None, :, None]
        elif which == "q":
            rows = rows * (self.b.attention_scale / self.a.attention_scale)
        rows = rows.flatten(0, 1)
        return rows.reshape(-1) if kind == "bias" else rows

    def _value(self, layer: int, module: str, kind: str, target: torch.Tensor) -> torch.Tensor | None:
        plan: HeadPlan = self.bundle.heads(layer)
        rows = self._donor(layer, f"{module}.{kind}", target)
        if rows is None:
            return torch.zeros_like(target, dtype=_wide(target)) if kind == "bias" else None
        groups = rows.reshape(self.b.n_kv_heads, self.b.head_dim, -1)[plan.group_pick.to(rows.device)]
        rows = (plan.value_to_target.to(rows) @ groups).flatten(0, 1)
        return rows.reshape(-1) if kind == "bias" else rows

    def _output(self, layer: int, module: str, kind: str, target: torch.Tensor) -> torch.Tensor:
        plan: HeadPlan = self.bundle.heads(layer)
        weight = self._donor_weight(layer, f"{module}.{kind}", target)
        mix, axes = plan.mix.to(weight), plan.value_to_donor.to(weight)
        result = weight.new_zeros(weight.shape[0], self.a.n_heads, self.a.head_dim)
        for b, a in torch.nonzero(plan.mix > 1e-6).tolist():  # every donor head that target head `a` stands for
            block = weight[:, b * self.b.head_dim : (b + 1) * self.b.head_dim]
            result[:, a] += mix[b, a] * (block @ axes[a // self.a.group, b // self.b.group])
        norms = (self.a.family.attention_post_norm, self.b.family.attention_post_norm)
        return self._write(result.flatten(1), layer, target, norms)

    # --- MLP ------------------------------------------------------------------------------------------------------
    def _up(self, layer: int, module: str, kind: str, target: torch.Tensor) -> torch.Tensor | None:
        weight = self._donor(layer, f"{module}.{kind}", target)
        if kind == "bias" or weight is None:
            return None
        return self.bundle.sparse(f"layers.{layer}.neurons.to_target").left(weight)

    def _down(self, layer: int, module: str, kind: str, target: torch.Tensor) -> torch.Tensor:
        weight = self._donor_weight(layer, f"{module}.{kind}", target)
        columns = self.bundle.sparse(f"layers.{layer}.neurons.to_donor").right(weight)
        return self._write(columns, layer, target, (self.a.family.mlp_post_norm, self.b.family.mlp_post_norm))

    # --- vocabulary -----------------------------------------------------------------------------------------------
    def _vocabulary(self, name: str, target: torch.Tensor) -> torch.Tensor:
        """Rows of shared tokens, transported; all other rows are the target's. A tied matrix takes the mean of both roles."""
        rows, donor_rows = self.bundle.tensors["tokens.target"].long(), self.bundle.tensors["tokens.donor"].long()
        roles = []
        if name == EMBEDDING:
            scale = self.bundle.info["embedding_scale"] * self.b.embedding_scale / self.a.embedding_scale
            taken = needed(self.read_donor(EMBEDDING), EMBEDDING)[donor_rows].to(target.device, _wide(target))
            roles.append(self.bundle.dense("residual.to_target").left(taken.T).T * scale)
        if name == HEAD or self.a.tied:
            weight = self.read_donor(HEAD)
            weight = needed(self.read_donor(EMBEDDING), EMBEDDING) if weight is None else weight
            taken = weight[donor_rows].to(target.device, _wide(target))
            gains = [
                needed(read(FINAL_NORM), FINAL_NORM).to(taken) + shape.family.norm_offset
                for read, shape in ((self.read_target, self.a), (self.read_donor, self.b))
            ]
            small = gains[0].abs() < SMALL_GAIN * gains[0].abs().median()
            mapped = self.bundle.dense("residual.to_donor").right(taken * gains[1])
            mapped = mapped / torch.where(small, torch.ones_like(gains[0]), gains[0])
            roles.append(torch.where(small, target[rows].to(mapped), mapped))
        result = target.to(_wide(target), copy=True)
        result[rows] = sum(roles) / len(roles)
        return result


def _wide(like: torch.Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _rotate_pairs(rows: torch.Tensor, pairs: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """Pick and rotate frequency pairs: `(heads, head_dim_donor, m)` to `(heads, head_dim_target, m)`."""
    half = rows.shape[1] // 2
    real, imaginary = rows[:, pairs], rows[:, pairs + half]
    cos, sin = phase.cos()[..., None], phase.sin()[..., None]
    return torch.cat([cos * real - sin * imaginary, sin * real + cos * imaginary], dim=1)
