"""Keep what a journey measured as a result file, so that pages can quote it.

python examples/journey/run.py --out JOURNEY              # once, on a CPU or with --device cuda
python benchmarks/journey/run.py JOURNEY [--name journey_gpu]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks._results import command_line, write  # noqa: E402


def rows_of(folder: Path) -> list[dict]:
    """Loss, size and seconds of every step, and the preference in every language before and after the second one."""
    rows = []
    for step in json.loads((folder / "steps.json").read_text(encoding="utf-8")):
        for metric in ("nll", "bytes", "seconds"):
            if step[metric] is not None:
                rows.append({"step": step["model"], "metric": metric, "value": step[metric]})
    for when in ("before", "after"):
        report = json.loads((folder / f"{when}.json").read_text(encoding="utf-8"))
        for language, found in report["languages"].items():
            for metric in ("accuracy", "perplexity"):
                rows.append({"when": when, "language": language, "metric": metric, "value": found[metric]})
        rows.append(
            {"when": when, "language": "mean", "metric": "accuracy", "value": report["overall"]["mean_accuracy"]}
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the --out of examples/journey/run.py")
    parser.add_argument("--name", default="journey", help="name of the result file (default %(default)s)")
    options = parser.parse_args()
    settings = json.loads((options.folder / "settings.json").read_text(encoding="utf-8"))
    rows = [{**row, "scale": settings["scale"], "device": settings["device"]} for row in rows_of(options.folder)]
    print(write(options.name, rows, "benchmarks.journey.claims", settings["command"] + "; " + command_line(), [0]))


if __name__ == "__main__":
    main()
