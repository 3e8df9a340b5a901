"""The options every MLC trainer adds to its TRL config."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from trl_mlc.losses import SIGMA_NORMS, SOLVERS
from trl_mlc.pooling import POOLINGS


if TYPE_CHECKING:
    Layer = str | int
else:
    Layer = str  # what the command line's parser reads; a number is taken out of it


OBJECTIVES = ("rank1", "cosine", "none")
CENTERS = ("none", "language", "common")


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class MLCArguments:
    """Options of the Multi-Lingual Consistency term; mixed in front of a TRL config.

    Args:
        mlc_weight (`float`, *optional*, defaults to 0.8):
            Weight of the term (lambda of the paper). 0 turns everything off: the run is the stock trainer's, bit for
            bit.
        mlc_layer (`str` or `int`, *optional*, defaults to `"auto"`):
            Index into `hidden_states`: 0 is the embedding, -1 the state after the final norm (the authors' configs).
            `"auto"` takes the layer whose centred states best retrieve translations in the training data.
        mlc_scan_prompts (`int`, *optional*, defaults to 64):
            Rows of the training data that `"auto"` and the first language means are computed from.
        mlc_pooling (`str`, *optional*, defaults to `"last"`):
            `"last"` token of the prompt (where the answer begins) or the `"mean"` of its tokens.
        mlc_objective (`str`, *optional*, defaults to `"rank1"`):
            `"rank1"`, the paper's loss; `"cosine"`, one minus the mean pairwise cosine (its ablation); `"none"`, only
            what `mlc_repulsion` and `mlc_contrast` add.
        mlc_temperature (`float`, *optional*, defaults to 0.2):
            Temperature of the softmax over singular values (tau).
        mlc_sigma_norm (`str`, *optional*, defaults to `"top"`):
            `"top"` divides singular values by the stop-gradient of the first (the released program); `"none"` is the
            printed formula, saturated at this temperature for ten languages.
        mlc_signed (`bool`, *optional*, defaults to `False`):
            See opposite directions, which singular values cannot.
        mlc_solver (`str`, *optional*, defaults to `"gram64"`):
            `"gram64"` (eigenvalues of the Gram matrix in float64) or `"svd"` (float32).
        mlc_center (`str`, *optional*, defaults to `"none"`):
            Running mean to subtract from the hidden states first. `"language"` (or `True`): each language's own, so
            that only what is said counts. `"common"`: the mean of all languages' means, so that what they share no
            longer hides the rest, and the distance between languages still counts.
        mlc_center_momentum (`float`, *optional*, defaults to 0.99):
            Weight of the past in those means.
        mlc_repulsion (`float`, *optional*, defaults to 0.0):
            Weight, inside the term, of the soft maximum of the cosine between different prompts of the batch. It needs
            a per-device batch of at least two prompts; other processes' prompts are not seen.
        mlc_repulsion_temperature (`float`, *optional*, defaults to 0.2):
            Temperature of that soft maximum: lower looks at the nearest wrong prompts only.
        mlc_contrast (`float`, *optional*, defaults to 0.0):
            Weight, inside the term, of the contrast: the cross-entropy of finding each translation's own anchor prompt
            among those of the batch. It needs several prompts per device, and gains nothing from wrong translations.
        mlc_contrast_temperature (`float`, *optional*, defaults to 0.1):
            Temperature of that cross-entropy.
        mlc_anchor_detached (`bool`, *optional*, defaults to `False`):
            The anchor's states are a target only: the term moves the translations towards them and not them towards
            the translations.
        mlc_extractor_dim (`int`, *optional*, defaults to 512):
            Width of the linear extractor; 0 for none.
        mlc_extractor_bias (`bool`, *optional*, defaults to `True`):
            Whether the extractor has a bias.
        mlc_extractor_frozen (`bool`, *optional*, defaults to `False`):
            Keep the extractor at its random start.
        mlc_extractor_lr (`float`, *optional*):
            Learning rate of the extractor; the model's, if not given.
        mlc_embedding_lr (`float`, *optional*):
            Learning rate of the input embedding; the model's, if not given. A head that is tied to it becomes a copy of
            its own and is not trained: words of other languages may then move fast, and what is said with a word stays.
        mlc_every (`int`, *optional*, defaults to 2):
            Compute the term on every k-th optimizer step only (2 in the authors' configs). Other steps don't run the
            prompts.
        mlc_languages_per_step (`int`, *optional*):
            Languages per step: the anchor and others drawn anew for each step from the seed. All, if not given.
        mlc_languages (`list[str]`, *optional*):
            Languages to use from the column, besides the anchor. All, if not given; required for streamed data.
        mlc_anchor (`str`, *optional*, defaults to `"en"`):
            Language of the `prompt` column.
        mlc_max_length (`int`, *optional*, defaults to 512):
            A longer prompt is left out of its group, and counted in a warning. It is never truncated: the last token
            must be the end of the prompt.
        mlc_buckets (`int`, *optional*, defaults to 0):
            0 lays the prompts end to end and runs them in one forward without padding, where the model keeps them apart
            (it is tried at the start; 6 where it does not). Else the most forwards that prompts are divided into by
            length. 1 where parameters are sharded.
        mlc_in_eval_loss (`bool`, *optional*, defaults to `False`):
            Add the term to `eval_loss`; it is logged as `eval_mlc/loss` either way.
    """

    mlc_weight: float = _option(0.8, "Weight of the consistency term; 0 is the stock trainer, bit for bit.")
    mlc_layer: Layer = _option("auto", "Index into hidden_states, or 'auto' to choose it by retrieval.")
    mlc_scan_prompts: int = _option(64, "Training rows used by mlc_layer='auto' and for the first language means.")
    mlc_pooling: str = _option("last", "'last' token of the prompt or 'mean' of its tokens.")
    mlc_objective: str = _option(
        "rank1", "'rank1' (the paper's loss), 'cosine' (its ablation), 'none' (only the guards)."
    )
    mlc_temperature: float = _option(0.2, "Temperature of the softmax over singular values.")
    mlc_sigma_norm: str = _option("top", "'top' divides by the first singular value, 'none' is the printed formula.")
    mlc_signed: bool = _option(False, "Also penalise opposite directions.")
    mlc_solver: str = _option("gram64", "'gram64' or 'svd'.")
    mlc_center: str = _option("none", "Running mean to subtract first: 'none', 'language' (each its own), 'common'.")
    mlc_center_momentum: float = _option(0.99, "Weight of the past in the language means.")
    mlc_repulsion: float = _option(0.0, "Weight of the repulsion between different prompts of a batch.")
    mlc_repulsion_temperature: float = _option(0.2, "Temperature of the repulsion's soft maximum.")
    mlc_contrast: float = _option(0.0, "Weight of finding each translation's own anchor prompt in the batch.")
    mlc_contrast_temperature: float = _option(0.1, "Temperature of the contrast's softmax.")
    mlc_anchor_detached: bool = _option(False, "The anchor's states are a target only, without a gradient.")
    mlc_extractor_dim: int = _option(512, "Width of the linear extractor, 0 for none.")
    mlc_extractor_bias: bool = _option(True, "Whether the extractor has a bias.")
    mlc_extractor_frozen: bool = _option(False, "Keep the extractor at its random start.")
    mlc_extractor_lr: float | None = _option(None, "Learning rate of the extractor; the model's, if not given.")
    mlc_embedding_lr: float | None = _option(None, "Learning rate of the input embedding, whose head is then frozen.")
    mlc_every: int = _option(2, "Compute the term on every k-th optimizer step.")
    mlc_languages_per_step: int | None = _option(None, "Languages per step, the anchor included; all, if not given.")
    mlc_languages: list[str] | None = _option(None, "Languages to use from the column; all, if not given.")
    mlc_anchor: str = _option("en", "Language of the prompt column.")
    mlc_max_length: int = _option(512, "Longer prompts are left out of their group, never truncated.")
    mlc_buckets: int = _option(0, "Most forwards the prompts are divided into by length; 0: one without padding.")
    mlc_in_eval_loss: bool = _option(False, "Add the term to eval_loss.")

    def __post_init__(self):
        self.mlc_layer = _layer(self.mlc_layer)
        self.mlc_center = {"true": "language", "false": "none"}.get(str(self.mlc_center).lower(), self.mlc_center)
        _one_of("mlc_center", self.mlc_center, CENTERS)
        _one_of("mlc_pooling", self.mlc_pooling, POOLINGS)
        _one_of("mlc_objective", self.mlc_objective, OBJECTIVES)
        _one_of("mlc_sigma_norm", self.mlc_sigma_norm, SIGMA_NORMS)
        _one_of("mlc_solver", self.mlc_solver, SOLVERS)
        for name in (f.name for f in fields(MLCArguments)):
            _check_type(name, getattr(self, name), MLCArguments.__dataclass_fields__[name].default)
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}.")
        for name in ("mlc_temperature", "mlc_repulsion_temperature", "mlc_contrast_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.mlc_center_momentum < 1:
            raise ValueError(f"mlc_center_momentum must lie in [0, 1), got {self.mlc_center_momentum}.")
        if self.mlc_extractor_lr is not None and (self.mlc_extractor_dim == 0 or self.mlc_extractor_frozen):
            raise ValueError(
                f"mlc_extractor_lr={self.mlc_extractor_lr} has nothing to train with "
                f"mlc_extractor_dim={self.mlc_extractor_dim}, mlc_extractor_frozen={self.mlc_extractor_frozen}; "
                "drop one of them."
            )
        if not str(self.mlc_anchor).strip():
            raise ValueError(f"mlc_anchor must name the language of the prompt column, got {self.mlc_anchor!r}.")
        self._check_host_options()
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def _check_host_options(self) -> None:
        """Refuse host options under which the term cannot be right."""
        if self.mlc_weight == 0:
            return
        for name in ("packing", "eval_packing"):
            if getattr(self, name, None):
                raise ValueError(
                    f"{name}=True mixes several rows into one sequence and drops their translations, so MLC cannot "
                    f"group prompts. Set {name}=False, or mlc_weight=0."
                )
        parallelism = getattr(self, "parallelism_config", None)
        for name in ("cp_size", "sp_size"):
            if getattr(parallelism, name, 1) > 1:
                raise ValueError(
                    f"parallelism_config.{name}={getattr(parallelism, name)} splits a sequence over processes; MLC "
                    f"reads whole prompts. Set {name}=1, or mlc_weight=0."
                )
        if getattr(self, "torch_compile", False):
            raise ValueError(
                "torch_compile=True cannot trace the prompt pass, which is handed over outside the model's arguments. "
                "Set torch_compile=False, or mlc_weight=0."
            )


_LOWEST = {
    "mlc_weight": 0,
    "mlc_repulsion": 0,
    "mlc_contrast": 0,
    "mlc_extractor_dim": 0,
    "mlc_extractor_lr": 0,
    "mlc_embedding_lr": 0,
    "mlc_scan_prompts": 2,
    "mlc_every": 1,
    "mlc_languages_per_step": 2,
    "mlc_max_length": 1,
    "mlc_buckets": 0,
}


_MAY_BE_NONE = ("mlc_extractor_lr", "mlc_embedding_lr", "mlc_languages_per_step", "mlc_languages")


def _check_type(name: str, value, default) -> None:
    """Refuse a value of another kind than the option's, before it is compared with anything."""
    if value is None and name in _MAY_BE_NONE:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or (isinstance(value, float) and math.isfinite(value))
    if name == "mlc_languages":
        good, kind = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of names"
    elif isinstance(default, bool):
        good, kind = isinstance(value, bool), "True or False"
    elif name.endswith("_lr") or isinstance(default, float):
        good, kind = number, "a finite number"
    elif name == "mlc_languages_per_step" or isinstance(default, int):
        good, kind = whole, "a whole number"
    else:
        good, kind = isinstance(value, (str, int)), "a name"
    if not good:
        raise ValueError(f"{name} must be {kind}, got {value!r}.")


def _layer(value: str | int) -> str | int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        if value == "auto":
            return value
        raise ValueError(f"mlc_layer must be an integer or 'auto', got {value!r}.") from None


def _one_of(name: str, value, allowed) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}.")
