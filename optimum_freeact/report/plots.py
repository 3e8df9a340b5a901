"""Figures of a comparison, drawn from its JSON file only; needs matplotlib (`pip install 'hf-concord[plots]'`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from optimum_freeact.report.report import FULL_PRECISION, Comparison


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_comparison(source: Path, target: Path) -> None:
    """Draw what is lost per scheme and preset, and the block errors behind it.

    Args:
        source (`Path`): A `comparison.json`.
        target (`Path`): The picture to be; its ending chooses the format.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    comparison = Comparison.from_json(source.read_text(encoding="utf-8"))
    rows = [row for row in comparison.rows if row.preset != FULL_PRECISION]
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    presets = list(dict.fromkeys(row.preset for row in rows))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)

    width = 0.8 / max(len(presets), 1)
    for number, preset in enumerate(presets):
        found = {row.scheme: row.excess for row in rows if row.preset == preset and row.excess is not None}
        places = [schemes.index(scheme) + (number - (len(presets) - 1) / 2) * width for scheme in found]
        bars = left.bar(places, list(found.values()), width * 0.92, label=preset, color=f"C{number}")
        left.bar_label(bars, [f"{value:.2g}" for value in found.values()], fontsize=7)
    left.set_xticks(range(len(schemes)), schemes)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_ylabel("excess nll (nats a token)")
    left.set_title("Lost against full precision")

    shown = next(
        (scheme for scheme in reversed(schemes) if any(r.scheme == scheme and r.output_error for r in rows)), ""
    )
    for number, preset in enumerate(presets):
        for row in rows:
            if (row.preset, row.scheme) == (preset, shown) and any(row.output_error):
                right.plot(
                    range(len(row.output_error)), row.output_error, marker=".", color=f"C{number}", label=preset
                )
                right.set_yscale("log")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("block")
    right.set_ylabel("relative error of the output")
    right.set_title(f"Calibration, {shown}" if shown else "Calibration")

    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(presets), frameon=False)
    figure.suptitle(f"{comparison.model}, {comparison.n_tokens} tokens of {comparison.text}")
    figure.savefig(target, dpi=150)
