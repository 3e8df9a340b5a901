"""What a plan depends on: calibration text and solver choices, validated once, at construction."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields

from mergekit_ot.residual import RESIDUAL_MAPS
from mergekit_ot.solvers import SOLVERS


PRESETS = ("structured", "paper", "paper-released")
EMBEDDINGS = ("keep", "shared")
MODULES = ("attn", "mlp")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}.")


@dataclass(frozen=True)
class Calibration:
    """Text on which activations are compared.

    Args:
        dataset (`str`): a `.jsonl` file with one object per line, or a text file with one text per line or paragraph.
        samples (`int`, *optional*, defaults to 512): texts used at most.
        rows (`int`, *optional*, defaults to 0): matched rows wanted; 0 means 4096, or what the widths need if more.
        max_length (`int`, *optional*, defaults to 128): tokens of each text used at most.
        text_key (`str`, *optional*, defaults to `"text"`): field of a `.jsonl` object that holds the text.
        seed (`int`, *optional*, defaults to 0): order of the texts and every random draw.
    """

    dataset: str
    samples: int = 512
    rows: int = 0
    max_length: int = 128
    text_key: str = "text"
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ValueError(f"calibration.dataset must name a file, got {self.dataset!r}.")
        _positive("calibration.samples", self.samples)
        _positive("calibration.max_length", self.max_length)
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 0:
            raise ValueError(f"calibration.rows must be 0 (automatic) or a positive whole number, got {self.rows!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"calibration.seed must be a whole number from 0, got {self.seed!r}.")


@dataclass(frozen=True)
class PlanSettings:
    """How plans are solved.

    Args:
        preset (`str`, *optional*, defaults to `"structured"`): `"structured"` (one stream map, one plan per MLP, heads
            by structure), `"paper"` (the paper's per-module plans with the right scale) or `"paper-released"` (its
            released arithmetic, for comparison).
        residual_map (`str`, *optional*, defaults to `"auto"`): `"ot"`, `"signed"`, `"procrustes"` or `"auto"`.
        solver (`str`, *optional*, defaults to `"auto"`): neuron plans: `"hard"`, `"entropic"`, `"unbalanced"`, or
            `"auto"`, which is hard up to `HARD_LIMIT` entries and entropic beyond.
        reg (`float | str`, *optional*, defaults to 0.03): entropic regularisation, or `"auto"`.
        layer_map (`str`, *optional*, defaults to `"monotone"`): `"monotone"` or explicit pairs such as `"0:0,1:3"`.
        modules (`tuple[str, ...]`, *optional*, defaults to `("attn", "mlp")`): blocks that take part.
        embeddings (`str`, *optional*, defaults to `"keep"`): `"shared"` also merges rows of tokens both models know.
    """

    preset: str = "structured"
    residual_map: str = "auto"
    solver: str = "auto"
    reg: float | str = 0.03
    layer_map: str = "monotone"
    modules: tuple[str, ...] = field(default=MODULES)
    embeddings: str = "keep"

    def __post_init__(self):
        object.__setattr__(self, "modules", tuple(self.modules))
        _choice("preset", self.preset, PRESETS)
        _choice("residual_map", self.residual_map, ("auto", *RESIDUAL_MAPS))
        _choice("solver", self.solver, ("auto", *SOLVERS))
        _choice("embeddings", self.embeddings, EMBEDDINGS)
        if not isinstance(self.layer_map, str):
            raise ValueError(f"layer_map must be 'monotone' or pairs such as '0:0,1:3', got {self.layer_map!r}.")
        if not self.modules or len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules must name distinct blocks of {list(MODULES)}, got {list(self.modules)}.")
        for module in self.modules:
            _choice("modules", module, MODULES)
        number = math.nan if isinstance(self.reg, str | bool) or not isinstance(self.reg, int | float) else self.reg
        if self.reg != "auto" and not (math.isfinite(number) and number > 0):
            raise ValueError(f"reg must be 'auto' or a positive number, got {self.reg!r}.")

    def to_dict(self) -> dict:
        """Plain JSON form."""
        return asdict(self) | {"modules": list(self.modules)}


#: Neuron plans with more entries than this are not solved exactly by `solver: auto` (1536 x 4864 takes 2 s on one core).
HARD_LIMIT = 12_000_000


def field_names(cls: type) -> tuple[str, ...]:
    """Names of a settings class' fields, for messages and recipes."""
    return tuple(item.name for item in fields(cls))
