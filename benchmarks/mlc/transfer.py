"""Does a rule taught in English hold in other languages, and is it translation that carries it?

    python benchmarks/mlc/transfer.py --map           # one other seed over training, objective, guards, languages, ...
    python benchmarks/mlc/transfer.py --ours chosen   # the table, five seeds, with the map's best point as ours
    python benchmarks/mlc/transfer.py --first regimes # the map's regimes, the table in the best of them, the rest of the map
    python benchmarks/mlc/transfer.py --ours POINT --rest # the table, then the map
    python benchmarks/mlc/transfer.py --tiny          # a few steps on a CPU: proves that it runs (with --map, too)

Task: see `concepts.py`. Every run trains on the same English preferences; it is scored on prompts never trained on.

How ours is chosen: the map uses a seed, and so concepts and prompts, that the table does not use, and holds out languages
that the table never holds out. Each of its points is scored by `transfer_claims.score`, which is the worst of what the
issue asks for, on these validation languages, against the run without the term in the same training regime. Without
`--methods` it first runs the term's main variant in several regimes, and in the best of them all variants, each also with
translations shuffled by rows.

Runs are made by worker processes (`--jobs`, dealt over the GPUs). Finished runs are kept in `--rows` (JSON lines), so a
table can be filled in several calls; the result file is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

from benchmarks._lanes import run_in_lanes
from benchmarks.mlc.transfer_claims import choose, choose_regime, claims, score
from benchmarks.mlc.transfer_methods import CLAIMED, MAIN, REGIMES, first_points, methods, point, second_points
from tools.result_files import ROOT, command_line, write


MAP_SEED = 100  # never one of the table's: what is chosen on it is measured on others
SHARED = ("model", "steps", "batch", "rows_train", "rows_test")  # options that a worker gets too


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="gemma3-270m", help="asset name or folder")
    add("--methods", nargs="+", help="of the table, or points of the map; all if not given")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add("--ours", default=f"{MAIN}@{next(iter(REGIMES))}", help="a point of the map, or 'chosen' from --map-rows")
    add("--map-rows", type=Path, help="finished runs of the map (default: runs/mlc_transfer_map.jsonl)")
    add("--map-seeds", nargs="+", type=int, default=[MAP_SEED], help="none of the table's")
    add("--steps", type=int, default=100)
    add("--batch", type=int, default=32)
    add("--rows-train", type=int, default=1600)
    add("--rows-test", type=int, default=200)
    add("--map", action="store_true", help="only the map")
    add(
        "--first",
        choices=("regimes",),
        help="first the map's regimes: ours is its main variant in the best of them; last the map",
    )
    add("--regimes", nargs="+", default=list(REGIMES), help="of the map's first part")
    add("--rest", action="store_true", help="after the table, the map: regimes, then variants in that of ours")
    add("--then", nargs="+", default=[], help="points of the map to run after the table")
    add("--tiny", action="store_true", help="2 steps on few rows, for a CPU")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--gpus", default="", help="numbers with commas; all if not given")
    add("--stop-seconds", type=float, default=1e9, help="no run is started, and none goes on, after it")
    add("--rows", type=Path, help="finished runs (default: runs/NAME.jsonl)")
    add("--folder", type=Path, default=ROOT / "benchmarks" / "results", help="where the result file goes")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.batch, options.rows_train, options.rows_test = 2, 2, 8, 4
        options.seeds = options.seeds[:2]
    suffix = "_tiny" if options.tiny else ""
    options.rows = options.rows or ROOT / "runs" / f"mlc_transfer{suffix}.jsonl"
    options.map_rows = options.map_rows or ROOT / "runs" / f"mlc_transfer_map{suffix}.jsonl"
    options.suffix = suffix
    wrong = unknown(options)
    if wrong:
        table = ", ".join(methods(f"{MAIN}@{next(iter(REGIMES))}"))
        parser.error(
            f"unknown {', '.join(wrong)}: the table has {table}; points of the map are POINT@REGIME, as "
            "benchmarks/mlc/transfer_methods.py names them."
        )
    return options


def unknown(options: argparse.Namespace) -> list[str]:
    """Names that stand for nothing, of methods of the table, of points and of regimes."""

    def is_point(name: str) -> bool:
        try:
            point(name)
        except (KeyError, ValueError):
            return False
        return True

    given = options.methods or []
    points = [*options.then, *(given if options.map else []), *([] if options.ours == "chosen" else [options.ours])]
    table = [] if options.map else given
    known = methods(f"{MAIN}@{next(iter(REGIMES))}")
    return [
        *(name for name in table if name not in known),
        *(name for name in points if not is_point(name)),
        *(name for name in options.regimes if name not in REGIMES),
    ]


def read_rows(path: Path) -> list[dict]:
    """Rows of finished runs; a line cut short by a stop is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found += json.loads(line)
        except json.JSONDecodeError:
            continue
    return found


def main() -> None:
    options = parse()
    if options.worker:
        from benchmarks.mlc.transfer_run import serve

        serve(options)
        return
    pool = Pool(options)
    if options.map or options.first:
        pool.run((options.map and options.methods) or first_points(options.regimes), options.map_seeds, mapping=True)
        options.ours = f"{MAIN}@{choose_regime(read_rows(options.map_rows))}"
        print(f"The best regime makes it {options.ours}.", flush=True)
    elif options.ours == "chosen":
        options.ours = choose(read_rows(options.map_rows))
        print(f"The map chooses {options.ours}.", flush=True)
    if not options.map:
        pool.run(options.methods or list(methods(options.ours)), options.seeds)
    if options.then:
        pool.run(options.then, options.map_seeds, mapping=True)
    if options.rest:
        pool.run(first_points(options.regimes), options.map_seeds, mapping=True)
    if (options.map and not options.methods) or options.first or options.rest:
        pool.run(second_points(options.ours.partition("@")[2]), options.map_seeds[:1], mapping=True)
    report(options)


def report(options: argparse.Namespace) -> None:
    """Print the score of each point of the map, and the claims."""
    rows = read_rows(options.map_rows)
    for name in sorted({row["method"] for row in rows}):
        found = score(rows, name) if "@" in name else None
        if found is not None:
            print(f"{name:40} {found:8.3f}", flush=True)
    for found in claims(read_rows(options.rows)):
        verdict = "holds" if found["holds"] else "FALLS SHORT"
        print(f"{found['id']:45} {found['value']:10.4f} {found['compare']} {found['target']:<6} {verdict}")


class Pool:
    """Runs of the table by worker processes, some at a time."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.start, self.lock = options, time.monotonic(), threading.Lock()
        self.gpus = options.gpus.split(",") if options.gpus else gpus()
        self.scratch = tempfile.TemporaryDirectory()
        self.idle: dict[str, list[subprocess.Popen]] = {}
        self.logs: dict[int, Path] = {}  # of a worker's process
        self.mapping, self.rows = False, options.rows

    def left(self) -> float:
        """Seconds until the stop."""
        return self.options.stop_seconds - (time.monotonic() - self.start)

    def run(self, names: list[str], seeds: list[int], mapping: bool = False) -> None:
        """Run what is not there yet, for all seeds; the result file is rewritten after each.

        What claims need comes first, in every seed. With `mapping`, the names are points of the map.
        """
        self.mapping = mapping
        self.rows = self.options.map_rows if self.mapping else self.options.rows
        self.rows.parent.mkdir(parents=True, exist_ok=True)
        claimed = [name for name in names if name in CLAIMED]
        parts = (claimed, [name for name in names if name not in CLAIMED])
        jobs = [(name, seed) for part in parts for seed in seeds for name in part]
        for _ in range(2):  # what failed for lack of memory beside others is tried once more
            done = {(row["method"], row["seed"]) for row in read_rows(self.rows)}
            run_in_lanes([job for job in jobs if job not in done], self.options.jobs, self.gpus, self.perform)
        done = {(row["method"], row["seed"]) for row in read_rows(self.rows)}
        print(
            f"{self.rows.name}: {len([job for job in jobs if job not in done])} of {len(jobs)} runs missing.",
            flush=True,
        )

    def perform(self, job: tuple[str, int], gpu: str) -> None:
        """One run, by a worker that may have made others before it."""
        if self.left() <= 0:
            return
        with self.lock:
            idle = self.idle.setdefault(gpu, [])
            worker = idle.pop() if idle else self.begin(gpu)
        target = Path(self.scratch.name) / f"{time.monotonic_ns()}-{threading.get_ident()}.json"
        ours = "" if self.mapping else self.options.ours
        worker.stdin.write(f"{ours}\t{job[0]}\t{job[1]}\t{target}\n")
        worker.stdin.flush()
        while not target.is_file() and worker.poll() is None and self.left() > 0:
            time.sleep(0.1)
        if not target.is_file():
            died = worker.poll() is not None
            said = self.logs[worker.pid].read_text(encoding="utf-8").strip().splitlines() if died else []
            print(f"{'DIED' if died else 'Stopped in'} {job}", *said[-1:], flush=True)
            worker.kill()
            return
        with self.lock:
            self.idle[gpu].append(worker)
            self.take(job, json.loads(target.read_text(encoding="utf-8")))

    def begin(self, gpu: str) -> subprocess.Popen:
        """A new worker; it ends when this process does."""
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        command += ["--tiny"] * self.options.tiny
        for name in SHARED:
            command += ["--" + name.replace("_", "-"), str(getattr(self.options, name))]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
        path = Path(self.scratch.name) / f"{time.monotonic_ns()}.log"
        with path.open("w") as log:
            worker = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, text=True
            )
        self.logs[worker.pid] = path
        return worker

    def take(self, job: tuple[str, int], found: list[dict] | dict) -> None:
        """Keep what a run found, or show why it found nothing."""
        if isinstance(found, dict):
            print(f"FAILED {job}: {found['error']}", flush=True)
            return
        with self.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")
        kept = ("accuracy", "variance", "perplexity", "loss last", "train_seconds")
        shown = {
            r["metric"]: float(f"{r['value']:.4g}")
            for r in found
            if "language" not in r and any(r["metric"].startswith(k) for k in kept)
        }
        print(f"{time.monotonic() - self.start:5.0f} s  seed {job[1]} {job[0]:32}", shown, flush=True)
        rows = read_rows(self.rows)
        name = "mlc_transfer" + "_map" * self.mapping + self.options.suffix
        source = "benchmarks.mlc." + ("transfer_claims" if name == "mlc_transfer" else "no_claims")
        seeds = sorted({row["seed"] for row in rows})
        write(name, rows, source, command_line(), seeds, folder=self.options.folder)


def gpus() -> list[str]:
    """Numbers of the GPUs here, or one empty name."""
    import torch

    return [str(i) for i in range(torch.cuda.device_count())] or [""]


if __name__ == "__main__":
    main()
