"""Pictures of token types, drawn from `token_types.json` only; needs matplotlib (`pip install 'hf-concord[plots]'`)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_types(source: Path, folder: Path) -> list[Path]:
    """Draw mean shares, rounding errors and spectra, by input, block and type.

    Args:
        source (`Path`): A `token_types.json`.
        folder (`Path`): Where the pictures go.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    document = json.loads(source.read_text(encoding="utf-8"))
    rows = document["rows"]
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    types = list(dict.fromkeys(row["type"] for row in rows))
    blocks = sorted({row["block"] for row in rows})
    middle = blocks[len(blocks) // 2]

    figure = Figure(figsize=(3.1 * len(inputs), 8.4), layout="constrained")
    grid: Any = figure.subplots(3, len(inputs), squeeze=False)
    for column, name in enumerate(inputs):
        for number, kind in enumerate(types):
            own = [row for row in rows if (row["input"], row["type"]) == (name, kind)]
            if not own:
                continue
            places, style = [row["block"] for row in own], {"color": f"C{number}", "marker": "."}
            grid[0][column].plot(places, [row["mean_share"] for row in own], label=kind, **style)
            grid[1][column].plot(places, [row["error_plain"] for row in own], alpha=0.35, **style)
            grid[1][column].plot(places, [row["error_typed"] for row in own], **style)
            shown = next((row for row in own if row["block"] == middle), own[0])
            grid[2][column].plot(range(len(shown["spectrum"])), shown["spectrum"], **style)
        grid[0][column].set_title(name)
        grid[0][column].set_ylim(0, 1.02)
        grid[1][column].set_yscale("log")
        grid[2][column].set_xticks(range(len(document["ranks"])), [str(rank) for rank in document["ranks"]])
        grid[2][column].set_ylim(0, 1.02)
        for row_number in (0, 1):
            grid[row_number][column].set_xlabel("block")
            grid[row_number][column].xaxis.get_major_locator().set_params(integer=True)
        grid[2][column].set_xlabel(f"directions removed, block {middle}")
    grid[0][0].set_ylabel("share of energy that is the mean")
    grid[1][0].set_ylabel("4-bit error: pale plain, full about the mean")
    grid[2][0].set_ylabel("centred energy left")
    handles = {
        label: handle for axes in grid[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(document["title"])
    target = folder / "token_types.png"
    figure.savefig(target, dpi=130)
    return [target]
