"""Send ten thousand damaged inputs through every way in, and kill every long job again and again.

    python benchmarks/hostile/run.py [--cases 12000] [--trials 12] [--progress FILE] [--seed 0] [--stop-seconds 240]

Each finished portion is one line of the progress file, so that an interrupted run goes on where it stopped, on the same
commit only. At the end the result is written to benchmarks/results/hostile.json. Takes some ten minutes on one core;
`--stop-seconds` begins nothing new after that time.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tools.result_files import command_line, commit_and_dirty, write  # noqa: E402


#: Share of all cases that a surface gets; those that load a model each time get fewer.
SHARES = {
    "freeact.config": 6, "freeact.data": 4, "freeact.weights": 2, "freeact.checkpoint_config": 2, "freeact.command_line": 4,
    "merge.recipe": 6, "merge.yaml": 4, "merge.texts": 4, "merge.checkpoint": 3, "merge.plans": 2,
    "merge.command_line": 4, "mlc.arguments": 6, "mlc.rows": 5, "mlc.data": 3, "mlc.state": 3, "mlc.command_line": 4,
}  # fmt: skip
PORTION = 250
JOBS = ("calibration", "training", "planning", "merging")


def portions(cases: int, seed: int) -> list[tuple[str, int, int]]:
    """Surface, seed and number of cases of every portion."""
    whole, found = sum(SHARES.values()), []
    for name, share in SHARES.items():
        count = -(-cases * share // whole)
        found += [(name, seed + i, min(PORTION, count - i * PORTION)) for i in range(-(-count // PORTION))]
    return found


def fuzz_portion(name: str, seed: int, cases: int) -> dict:
    """Run one portion; returns its progress line."""
    from transformers.utils import logging as chatter

    from tests.hostile import freeact_surfaces, merge_surfaces, mlc_surfaces
    from tests.hostile.surfaces import fuzz

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    surfaces = {**freeact_surfaces.SURFACES, **merge_surfaces.SURFACES, **mlc_surfaces.SURFACES}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        found = fuzz(surfaces[name], cases, seed, Path(folder) / "cases")
    line = {"surface": name, "seed": seed, **found.counts, "seconds": round(time.perf_counter() - start, 1)}
    return line | {"findings": found.findings}


def kill_trials(job: str, seed: int, trials: int) -> list[dict]:
    """Run the trials of one job in a process of their own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.hostile.kills", job, str(seed), str(trials), "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=3600)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def rows_of(lines: list[dict]) -> list[dict]:
    """Result rows: counts per surface, and per job."""
    rows, surfaces, jobs = (
        [],
        collections.defaultdict(collections.Counter),
        collections.defaultdict(collections.Counter),
    )
    for line in lines:
        if "surface" in line:
            kinds = ("accepted", "refused", "unexplained", "partial")
            surfaces[line["surface"]].update({kind: line.get(kind, 0) for kind in kinds})
        else:
            more = {"trials": 1, "kills": line["kills"], "partial": line["partial"], "left": line["left"]}
            jobs[line["job"]].update(more | {"lost": 0 if line["equal"] else line["kills"]})
    for name, counts in surfaces.items():
        place = {"part": "fuzz", "surface": name}
        rows.append({**place, "metric": "cases", "value": sum(counts.values())})
        rows += [{**place, "metric": kind, "value": counts[kind]} for kind in ("accepted", "refused", "unexplained")]
        rows.append({**place, "metric": "partial_outputs", "value": counts["partial"]})
    named = {"trials": "trials", "kills": "kills", "lost": "kills_with_another_result", "partial": "partial_outputs"}
    for name, counts in jobs.items():
        for key, metric in (*named.items(), ("left", "scratch_folders_left")):
            rows.append({"part": "kills", "job": name, "metric": metric, "value": counts[key]})
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--trials", type=int, default=12, help="of each of the four jobs, with up to two kills each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", type=Path, default=ROOT / "out" / "hostile.jsonl")
    parser.add_argument("--stop-seconds", type=float, default=float("inf"), help="the same command goes on later")
    args = parser.parse_args()
    args.progress.parent.mkdir(parents=True, exist_ok=True)
    start, (commit, dirty) = time.monotonic(), commit_and_dirty()
    commit += "-dirty" * dirty
    known = [json.loads(line) for line in args.progress.read_text().splitlines()] if args.progress.exists() else []
    if strange := {line["commit"] for line in known} - {commit}:
        raise SystemExit(f"{args.progress} was made at {', '.join(sorted(strange))}; remove it to begin again.")
    done = {(line.get("surface", line.get("job")), line["seed"]) for line in known}

    def keep(line: dict) -> None:
        line["commit"] = commit
        known.append(line)
        with args.progress.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print({key: value for key, value in line.items() if key != "findings"}, *line.get("findings", []), sep="\n  ")

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for name, seed, cases in portions(args.cases, args.seed):
        if (name, seed) not in done:
            if time.monotonic() - start > args.stop_seconds:
                return 0
            keep(fuzz_portion(name, seed, cases))
    for job in JOBS:
        for seed in range(args.seed, args.seed + args.trials, 4):
            wanted = [s for s in range(seed, min(seed + 4, args.seed + args.trials)) if (job, s) not in done]
            if wanted and time.monotonic() - start > args.stop_seconds:
                return 0
            for line in kill_trials(job, wanted[0], len(wanted)) if wanted else []:
                keep(line)
    logging.disable(logging.NOTSET)
    path = write("hostile", rows_of(known), "benchmarks.hostile.claims", command_line(), [args.seed])
    print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
