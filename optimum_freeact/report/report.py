"""The comparison of presets on one model: plain rows, and the JSON and Markdown files made from them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


FORMAT_VERSION = 1
FULL_PRECISION = "full precision"
HEADINGS = ("scheme", "preset", "perplexity", "nll", "excess nll", "size", "seconds")


@dataclass(frozen=True)
class Row:
    """One preset at one scheme (or the full-precision model), measured.

    Args:
        preset, scheme (`str`): What was run, e.g. `"freeact"` at `"W4A4"`.
        nll (`float`, *optional*): Mean negative log-likelihood in nats a token; `None` where there is none.
        perplexity (`float`, *optional*): Its exponential.
        excess (`float`, *optional*): nll less the full-precision model's.
        size_ratio (`float`, *optional*): Bytes of the quantized linears over those in bfloat16.
        calibration_seconds, evaluation_seconds (`float`, *optional*): Time taken.
        output_error (`list[float]`): Relative error of each block's output in calibration.
        note (`str`): Why a number is missing.
    """

    preset: str
    scheme: str
    nll: float | None = None
    perplexity: float | None = None
    excess: float | None = None
    size_ratio: float | None = None
    calibration_seconds: float | None = None
    evaluation_seconds: float | None = None
    output_error: list[float] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All rows of one model, the full-precision one first, and what they were measured on.

    Args:
        model, dataset, text (`str`): Names; never a place on somebody's machine.
        n_tokens, window (`int`): Predicted tokens, and tokens a window, of the evaluation.
        settings (`dict`): Calibration settings common to all rows.
        machine (`dict`): What it ran on.
        rows (`list[Row]`): The measurements.
        masked (`bool`, *optional*, defaults to `False`): A masked-diffusion model, scored by `evaluate_masked`.
    """

    model: str
    dataset: str
    text: str
    n_tokens: int
    window: int
    settings: dict[str, Any]
    machine: dict[str, str]
    rows: list[Row]
    masked: bool = False

    def to_json(self) -> str:
        """JSON with a number or null in every place."""
        document = {"kind": "freeact-comparison", "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read what [`to_json`] wrote.

        Raises:
            `ValueError`: if it is no comparison of this or an older format.
        """
        document = json.loads(text)
        if not isinstance(document, dict) or document.pop("kind", None) != "freeact-comparison":
            raise ValueError("This JSON is no comparison written by `freeact compare`.")
        version = document.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"The comparison has format version {version}; this release reads {FORMAT_VERSION}.")
        document["rows"] = [Row(**row) for row in document["rows"]]
        return cls(**document)

    def to_markdown(self) -> str:
        """A page with the table and what it was measured on."""
        lines = [f"# {self.model}: presets compared", "", _line(HEADINGS)]
        lines.append("| --- | --- |" + " ---: |" * (len(HEADINGS) - 2))
        lines += [_line(cells(row)) for row in self.rows]
        lines += ["", *(f"- {row.scheme} {row.preset}: {row.note}" for row in self.rows if row.note)]
        lines += ["", *(f"- {name}: {value}" for name, value in self.facts().items())]
        return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"

    def facts(self) -> dict[str, str]:
        """What the numbers mean and where they come from, for the foot of a table."""
        bound = ", some of them hidden: nll and perplexity are upper bounds" if self.masked else ""
        return {
            "evaluated on": f"{self.text}, {self.n_tokens} tokens in windows of {self.window}{bound}",
            "calibrated on": ", ".join([self.dataset, *(f"{k} {v}" for k, v in self.settings.items())]),
            "excess nll": "nats a token above full precision",
            "size": "bytes of the quantized linears over those in bfloat16",
            "seconds": "of calibration",
            "machine": ", ".join(f"{v}" if k == "processor" else f"{k} {v}" for k, v in self.machine.items()),
        }


def measured(preset: str, scheme: str, nll: float, reference: float, **fields: Any) -> Row:
    """A row from a measured nll and the full-precision model's; a model that broke gets a note instead of NaN."""
    if not math.isfinite(nll):
        return Row(preset, scheme, note=f"the model's nll is {nll}", **fields)
    return Row(preset, scheme, nll, math.exp(min(nll, 700.0)), nll - reference, **fields)


def cells(row: Row) -> tuple[str, ...]:
    """A row's table cells, in the order of [`HEADINGS`]."""

    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    perplexity = show(row.perplexity, ".2f" if (row.perplexity or 0) < 1e5 else ".3g")
    return (
        row.scheme,
        row.preset,
        "failed" if row.nll is None else perplexity,
        show(row.nll, ".4f"),
        show(row.excess, "+.4f"),
        show(row.size_ratio, ".3f"),
        show(row.calibration_seconds, ".1f"),
    )


def _line(parts: tuple[str, ...]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"


def write_files(comparison: Comparison, folder: Path) -> list[str]:
    """Write `comparison.json` and `comparison.md`; returns their names."""
    (folder / "comparison.json").write_text(comparison.to_json(), encoding="utf-8")
    (folder / "comparison.md").write_text(comparison.to_markdown(), encoding="utf-8")
    return ["comparison.json", "comparison.md"]
