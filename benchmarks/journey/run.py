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

from tools.result_files import command_line, write  # noqa: E402


def rows_of(folder: Path) -> list[dict]:
    """Seconds, loss and size of every step, and the preference in every language before and after the second one.

    Of a journey that was cut off, those that there are.
    """
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    rows = [{"step": step, "metric": "seconds", "value": value} for step, value in seconds.items()]
    scored = folder / "steps.json"
    for step in json.loads(scored.read_text(encoding="utf-8")) if scored.is_file() else ():
        rows += [{"step": step["model"], "metric": metric, "value": step[metric]} for metric in ("nll", "bytes")]
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
    parser.add_argument("--busy", action="store_true", help="leave out the seconds, which other programs disturbed")
    parser.add_argument("--machine", help="where the journey ran, if not here")
    options = parser.parse_args()
    settings = json.loads((options.folder / "settings.json").read_text(encoding="utf-8"))
    rows = [{**row, "scale": settings["scale"], "device": settings["device"]} for row in rows_of(options.folder)]
    rows = [row for row in rows if not (options.busy and row["metric"] == "seconds")]
    commands = settings["command"] + "; " + command_line()
    print(write(options.name, rows, "benchmarks.journey.claims", commands, [0], machine=options.machine))


if __name__ == "__main__":
    main()
