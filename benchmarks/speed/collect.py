"""Rows that `run.sh` left in a folder, as `benchmarks/results/speed.json`, or calibration's as `speed_calibration.json`.

python -m benchmarks.speed.collect FOLDER [--name speed_calibration]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.result_files import write


FILES = ("linear.jsonl", "model.jsonl", "calibrate.jsonl", "step.jsonl")
DATASHEET = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second that the vendor states, SXM
COMMANDS = {
    "speed": "bash benchmarks/speed/run.sh all OUT",
    "speed_calibration": "python -m benchmarks.speed.calibrate --layers 2 --out OUT && BLOCKS=2 bash benchmarks/speed/run.sh across OUT",
}


def read_rows(folder: Path) -> list[dict]:
    """All rows of a run; a row that was measured twice counts as measured last."""
    found: dict[tuple, dict] = {}
    for name in FILES:
        path = folder / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            row = {"what": "model", **json.loads(line)} if name == "model.jsonl" else json.loads(line)
            key = tuple(sorted((k, v) for k, v in row.items() if k not in ("value", "spread", "note")))
            found[key] = row
    return list(found.values())


def main() -> None:
    """Write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", choices=sorted(COMMANDS), default="speed")
    parser.add_argument("--command", help="what made the rows, where it was not the usual command")
    args = parser.parse_args()
    machine = args.folder / "machine.json"
    rows = read_rows(args.folder)
    name = json.loads(machine.read_text()) if machine.is_file() else None
    rows += [
        {"what": "roof", "provider": f"datasheet {gpu}", "metric": "bytes_per_second", "value": value}
        for gpu, value in DATASHEET.items()
        if gpu in str(name) and args.name == "speed"
    ]
    print(write(args.name, rows, "benchmarks.speed.claims", args.command or COMMANDS[args.name], [0], machine=name))


if __name__ == "__main__":
    main()
