"""What a job of the accuracy benchmark is: one quantized model, its texts, and the rows that say what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_freeact.presets import PRESETS


SCHEMES = ("w4a16", "w4a8", "w4a4", "w4a4kv4")
# characters of each text: calibration comes from the first range, evaluation starts at the second
SLICES = {"handbook": ((0, 300_000), 600_000), "brown": ((0, 600_000), 4_000_000)}
# where variants are scored from which one is chosen: behind what is calibrated on, before what is evaluated on
VALIDATION = {"handbook": 320_000, "brown": 1_000_000}
CHARS_PER_TOKEN = 12  # more than any tokenizer here makes of English: how much of the text is read for the windows


@dataclass(frozen=True)
class Text:
    """A text file and the ranges of it that calibration and evaluation read."""

    name: str
    path: str
    calibration: tuple[int, int]
    evaluation: int

    def __post_init__(self):
        if not 0 <= self.calibration[0] < self.calibration[1] <= self.evaluation:
            raise ValueError(
                f"Text {self.name!r}: calibration reads characters {self.calibration}, evaluation those from "
                f"{self.evaluation}; they must not overlap."
            )

    def for_choosing(self) -> Text:
        """The same text, scored where no claim is: for choices between variants."""
        return dataclasses.replace(self, evaluation=min(VALIDATION[self.name], self.evaluation))

    def read_calibration(self) -> str:
        """The characters to calibrate on."""
        start, stop = self.calibration
        return Path(self.path).read_text(encoding="utf-8")[start:stop]

    def read_evaluation(self, n_tokens: int) -> str:
        """The held-out characters, at least enough for so many tokens where the text has them."""
        return Path(self.path).read_text(encoding="utf-8")[self.evaluation :][: n_tokens * CHARS_PER_TOKEN]


@dataclass(frozen=True)
class Job:
    """One calibration and what is scored after it.

    Args:
        model: Key of the model in rows and claims.
        group: `full`, `preset`, `ablation`, `peer` or `cpu_cost`.
        method: Name in the rows.
        settings: The first is quantized; a second differs from it only in the cache's bits and shares its weights.
        quantize: Fields of `FreeActConfig` beside the bits; `{"peer": name}` for a peer; empty for full precision.
        measure: `samples`, `seq_len`, `batch_size`, `windows`, `window`, and `score` (False: cost only).
        rank: Small ones are started first.
    """

    model: str
    group: str
    method: str
    settings: tuple[str, ...]
    seed: int
    quantize: dict
    measure: dict
    model_path: str
    texts: tuple[Text, ...]
    device: str = "cpu"
    threads: int | None = None
    rank: int = 0
    note: str = ""

    @property
    def name(self) -> str:
        """What a log line calls it."""
        return f"{self.model} {self.method} {'+'.join(self.settings)} seed {self.seed}"

    @property
    def is_learned(self) -> bool:
        """Whether it takes gradient steps: minutes, where closed forms take seconds."""
        preset = PRESETS.get(self.quantize.get("preset", ""), {})
        return {**preset, **self.quantize}.get("calibration") == "learned"

    @property
    def key(self) -> str:
        """Same for jobs that measure the same thing, wherever the files lie."""
        plain = dataclasses.asdict(self)
        for text in plain["texts"]:
            text.pop("path")
        told = {k: v for k, v in plain.items() if k not in ("model_path", "threads", "rank", "note")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `json.dumps(dataclasses.asdict(job))` wrote."""
        plain = json.loads(text)
        texts = tuple(Text(**{**t, "calibration": tuple(t["calibration"])}) for t in plain.pop("texts"))
        return cls(**{**plain, "settings": tuple(plain["settings"]), "texts": texts})


def bits(setting: str) -> dict[str, int]:
    """`w4a4kv4` as fields of the config."""
    found = re.fullmatch(r"w(\d+)a(\d+)(?:kv(\d+))?", setting)
    if found is None:
        raise ValueError(f"A setting is like w4a16, w4a8, w4a4 or w4a4kv4, got {setting!r}.")
    weight, activation, cache = found.groups()
    return {"weight_bits": int(weight), "activation_bits": int(activation), "kv_bits": int(cache or 16)}


def row(job: Job, setting: str, metric: str, value: float | None, note: str = "", **more: Any) -> dict:
    row = {"model": job.model, "group": job.group, "method": job.method, "setting": setting, **more}
    note = "; ".join(part for part in (job.note, note) if part)
    return {**row, "metric": metric, "value": value, "seed": job.seed, **({"note": note} if note else {})}


def absent(job: Job, reason: str) -> list[dict]:
    """The rows of a job that gave none: no value, and why."""
    measure = job.measure
    if not measure.get("score", True):
        return [row(job, job.settings[0], "calibration_seconds", None, reason)]
    n_tokens = measure["windows"] * (measure["window"] - 1)
    return [
        row(job, setting, "nll", None, reason, text=text.name, n_tokens=n_tokens)
        for setting in job.settings
        for text in job.texts
    ]
