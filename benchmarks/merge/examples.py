"""The example recipes as a user runs them, and what their reports say of the merge and its controls.

python benchmarks/merge/examples.py                 # CPU, about half an hour; needs the assets of examples/merge/prepare.py
python benchmarks/merge/examples.py --collect       # only the result file, of the reports that are there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.result_files import command_line, write  # noqa: E402


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "merge"
#: Recipe, its argument of `prepare.py`, and what `eval` is given.
EXAMPLES = {
    "relative": ("relative", ["--texts", str(FOLDER / "work" / "handbook-eval.txt"), "--max-tokens", "4096"]),
    "code": ("code", []),
    "stock": ("code", []),
}


def run(name: str) -> None:
    """Prepare, check, merge and score one example by the command line."""
    prepared, options = EXAMPLES[name]
    recipe, out = str(FOLDER / f"{name}.yml"), str(FOLDER / "work" / f"{name}-merge")
    subprocess.run([sys.executable, str(FOLDER / "prepare.py"), prepared], check=True)
    for arguments in (["check", recipe], ["run", recipe, out], ["eval", recipe, out, *options]):
        subprocess.run([sys.executable, "-m", "mergekit_ot", *arguments], check=True)


def rows_of(name: str, folder: Path = FOLDER) -> list[dict]:
    """What an example's report says, or nothing where there is none."""
    report = folder / "work" / f"{name}-merge.report" / "report.json"
    if not report.is_file():
        return []
    told = json.loads(report.read_text(encoding="utf-8"))
    place = {"example": name}
    rows = [
        place | {"model": row["model"], "metric": "nats per token", "value": row["loss"]} for row in told["losses"]
    ]
    rows.append(place | {"metric": "scored tokens", "value": told["tokens"]})
    return [*rows, place | {"metric": "merged tensors", "value": len(told["tensors"])}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", nargs="*", default=list(EXAMPLES), choices=list(EXAMPLES))
    parser.add_argument("--collect", action="store_true", help="write the result file of the reports that are there")
    options = parser.parse_args()
    for name in [] if options.collect else options.examples:
        run(name)
    rows = [row for name in options.examples for row in rows_of(name)]
    if not rows:
        sys.exit(f"There is no report in {FOLDER / 'work'}; run without --collect.")
    print(write("merge_examples", rows, "benchmarks.merge.no_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
