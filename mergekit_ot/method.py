"""The mergekit merge method `transport`: one target tensor in, one merged tensor out.

mergekit sees a method with one input, the base; the donor is a parameter, because mergekit requires equal shapes and
depths of its inputs. Donor tensors are read lazily through mergekit's own loaders.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    TensorGroup,
)
from mergekit.merge_methods.base import ParameterSpec

from mergekit_ot.alpha import DEFAULT_ALPHA
from mergekit_ot.bundle import load_bundle
from mergekit_ot.gate import DEFAULT_MIN_CONFIDENCE, GATES, effective_alpha
from mergekit_ot.planning import make_bundle, open_pair, plan_key
from mergekit_ot.settings import Calibration, PlanSettings
from mergekit_ot.transport import interpolate
from mergekit_ot.transporter import Transporter


#: Name of the method in a recipe.
METHOD = "transport"
#: What stands in for the transported weight: itself, zero (shrink-only), or the donor's own weight (plain interpolation).
CONTROLS = ("none", "shrink", "plain")
#: Parameters of the method as mergekit knows them: name, type, default.
PARAMETERS: tuple[tuple[str, Any, Any], ...] = (
    ("alpha", float, DEFAULT_ALPHA),
    ("plan", str, ""),
    ("gate", str, "close"),
    ("min_confidence", float, DEFAULT_MIN_CONFIDENCE),
    ("control", str, "none"),
    ("preset", str, "structured"),
    ("residual_map", str, "auto"),
    ("solver", str, "auto"),
    ("reg", float | str, 0.03),
    ("layer_map", str, "monotone"),
    ("modules", str, "attn,mlp"),
    ("embeddings", str, "keep"),
    ("calibration_dataset", str, ""),
    ("calibration_samples", int, 512),
    ("calibration_rows", int, 0),
    ("calibration_max_length", int, 128),
    ("calibration_text_key", str, "text"),
    ("calibration_seed", int, 0),
)


class TransportMerge(GroupMergeMethod):
    """Merge a donor of any supported size and family into the base, through transport plans."""

    spec = MergeMethodSpec(
        name=METHOD,
        pretty_name="Optimal-transport merge",
        reference_url="https://arxiv.org/abs/2602.05495",
        parameters=(
            ParameterSpec("donor", str, ParameterScope.SHARED),
            *(ParameterSpec(name, kind, ParameterScope.SHARED, default) for name, kind, default in PARAMETERS),
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=1, max_inputs=1),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def __init__(self):
        self._lock = threading.Lock()
        self._transporters: dict[tuple, Transporter] = {}
        #: What happened to each tensor since the last `release`: alpha used, and size and direction of the transported.
        self.records: dict[str, dict[str, float]] = {}

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Interpolate the base's tensor with the transported one; tensors that stay the base's are returned as they are."""
        base, alpha = group.base, parameters["alpha"]
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha!r} for {group.metadata.name}.")
        for name, allowed in (("gate", GATES), ("control", CONTROLS)):
            if parameters[name] not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {parameters[name]!r}.")
        if alpha == 0.0 or group.metadata.name is None:
            return base.tensor
        transporter = self._transporter(base.id, parameters)
        alpha = effective_alpha(
            alpha, transporter.bundle, group.metadata.name, parameters["gate"], parameters["min_confidence"]
        )
        if alpha == 0.0:
            return base.tensor
        transported = transporter.transport(group.metadata.name, base.tensor)
        if transported is None:
            return base.tensor
        transported = self._replaced(transported, transporter, group.metadata.name, parameters["control"])
        self._record(group.metadata.name, base.tensor, transported, alpha)
        return interpolate(base.tensor, transported, alpha)

    @staticmethod
    def _replaced(transported: torch.Tensor, transporter: Transporter, name: str, control: str) -> torch.Tensor:
        if control == "shrink":
            return torch.zeros_like(transported)
        if control == "plain":
            own = transporter.read_donor(name)
            if own is None or own.shape != transported.shape:
                raise ValueError(
                    f"Plain interpolation needs equal shapes; the donor's {name} does not fit the target's."
                )
            return own.to(transported)
        return transported

    def _record(self, name: str, base: torch.Tensor, transported: torch.Tensor, alpha: float) -> None:
        wide = base.to(transported)
        norms = float(wide.norm()), float(transported.norm())
        cosine = float((wide * transported).sum()) / max(norms[0] * norms[1], 1e-30)
        with self._lock:
            self.records[name] = {"alpha": alpha, "norm_ratio": norms[1] / max(norms[0], 1e-30), "cosine": cosine}

    def prepare(self, base: ModelReference, parameters: dict[str, Any]) -> Transporter:
        """Load or solve the plans and open both models in the calling thread, before mergekit starts its own."""
        return self._transporter(base, {name: default for name, _, default in PARAMETERS} | parameters)

    def release(self) -> None:
        """Forget all loaded plans and records."""
        with self._lock:
            self._transporters.clear()
            self.records.clear()

    def _transporter(self, base: ModelReference, parameters: dict[str, Any]) -> Transporter:
        names = [name for name, _, _ in PARAMETERS if name not in ("alpha", "gate", "min_confidence", "control")]
        key = (str(base), parameters["donor"], *(parameters[name] for name in names))
        with self._lock:
            if key not in self._transporters:
                with torch.device("cpu"):  # mergekit's workers change the default device
                    self._transporters[key] = self._open(base, parameters)
            return self._transporters[key]

    def _open(self, base: ModelReference, parameters: dict[str, Any]) -> Transporter:
        donor = ModelReference.model_validate(parameters["donor"])
        for reference in (base, donor):
            if reference.lora is not None:
                raise ValueError(f"{reference}: adapters cannot be transported; merge the LoRA into its model first.")
        pair = open_pair(str(base.model.path), str(donor.model.path))
        if parameters["plan"]:
            bundle = load_bundle(parameters["plan"])
        else:
            if not parameters["calibration_dataset"]:
                raise ValueError("Give either parameters.plan (a solved bundle) or parameters.calibration_dataset.")
            calibration, settings = settings_from_parameters(parameters)
            out = Path(".mergekit_ot") / plan_key(pair, calibration, settings)[:16]
            bundle = make_bundle(pair, calibration, settings, out, quiet=True)
        for side, shape in (("target", pair.target), ("donor", pair.donor)):
            if bundle.info[side] != shape.summary():
                raise ValueError(
                    f"The plans in {parameters['plan']!r} were solved for a {side} of shape {bundle.info[side]}, but "
                    f"{shape.name} has shape {shape.summary()}; solve them again."
                )
        return Transporter(bundle, pair.target, pair.donor, _reader(base), _reader(donor))


def settings_from_parameters(parameters: dict[str, Any]) -> tuple[Calibration, PlanSettings]:
    """Split the flat parameters of a stock recipe into calibration and plan settings."""
    calibration = Calibration(
        **{
            name.removeprefix("calibration_"): parameters[name]
            for name, _, _ in PARAMETERS
            if name.startswith("calibration_")
        }
    )
    names = ("preset", "residual_map", "solver", "reg", "layer_map", "embeddings")
    modules = tuple(part.strip() for part in parameters["modules"].split(","))
    return calibration, PlanSettings(modules=modules, **{name: parameters[name] for name in names})


def _reader(model: ModelReference) -> Callable[[str], torch.Tensor | None]:
    loader = LoaderCache().get(model)

    def read(name: str) -> torch.Tensor | None:
        return loader.get_tensor(name, device="cpu") if name in loader.index.tensor_paths else None

    return read
