"""Does a rule taught in English hold in other languages, and is it translation that carries it?

    python benchmarks/mlc/transfer.py                 # the table: all methods, three seeds
    python benchmarks/mlc/transfer.py --map           # one other seed over layer, weight, centring, repulsion, ...
    python benchmarks/mlc/transfer.py --ours chosen   # the table, with the best candidate of the map as ours
    python benchmarks/mlc/transfer.py --tiny          # a few steps on a CPU: proves that it runs

Task: see `concepts.py`. Every run trains on the same English preferences for the same steps; it is scored on prompts
never trained on. A run is a process of its own (`--jobs` at a time, dealt over the GPUs). Finished runs are kept in
`--rows` (JSON lines), so a table can be filled in several calls; the result file is written anew after each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, from anywhere

from benchmarks._results import ROOT, command_line, write
from benchmarks.mlc.transfer_claims import choose, claims
from benchmarks.mlc.transfer_methods import CANDIDATES, DEFAULT, map_points, methods


MAP_SEED = 100  # never one of the table's: what is chosen on it is measured on others
MAP_RATES = (1e-4, 2e-5)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="gemma3-270m", help="asset name or folder")
    add("--methods", nargs="+", help="of the table, or of the map; all if not given")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--ours", default=DEFAULT, help=f"one of {', '.join(CANDIDATES)}, or 'chosen' by the map beside --rows")
    add("--steps", type=int, default=120)
    add("--batch", type=int, default=32)
    add("--learning-rate", type=float, default=5e-5)
    add("--lora", type=int, default=0, help="rank; 0 trains all weights")
    add("--rows-train", type=int, default=1600)
    add("--rows-test", type=int, default=150)
    add("--map", action="store_true")
    add("--tiny", action="store_true", help="2 steps on few rows, for a CPU")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--gpus", default="", help="numbers with commas; all if not given")
    add("--stop-seconds", type=float, default=1e9, help="no run is started, and none goes on, after it")
    add("--rows", type=Path, help="finished runs (default: runs/NAME.jsonl)")
    add("--folder", type=Path, default=ROOT / "benchmarks" / "results", help="where the result file goes")
    add("--worker", nargs=3, metavar=("METHOD", "SEED", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.batch, options.rows_train, options.rows_test = 2, 2, 8, 4
        options.seeds = options.seeds[:2]
    if options.map:
        options.seeds = [MAP_SEED]
    options.name = "mlc_transfer" + ("_map" if options.map else "") + ("_tiny" if options.tiny else "")
    options.rows = options.rows or ROOT / "runs" / f"{options.name}.jsonl"
    return options


def table(options: argparse.Namespace) -> dict[str, dict]:
    """Settings of each run; those of the map also set what the whole table shares."""
    if options.map:
        return map_points(MAP_RATES)
    return methods(options.ours)


def take_the_chosen(options: argparse.Namespace) -> None:
    """Replace `--ours chosen` by the map's best candidate, and the learning rate by its own."""
    found = read_rows(options.rows.with_name("mlc_transfer_map" + "_tiny" * options.tiny + ".jsonl"))
    try:
        name = choose(found, list(map_points(MAP_RATES)))
    except ValueError as error:
        print(f"{error} Ours is the default, {DEFAULT}.", flush=True)
        options.ours = DEFAULT
        return
    settings = map_points(MAP_RATES)[name]
    options.ours = name.split(",rate=")[0]
    options.learning_rate = settings.get("learning_rate", options.learning_rate)
    print(f"The map chooses {name}.", flush=True)


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
        from benchmarks.mlc.transfer_run import perform

        method, seed, target = options.worker
        found = perform(method, table(options)[method], int(seed), options)
        Path(target).write_text(json.dumps(found), encoding="utf-8")
        return
    if options.ours == "chosen":
        take_the_chosen(options)
    wanted = [(name, seed) for name in options.methods or table(options) for seed in options.seeds]
    done = {(row["method"], row["seed"]) for row in read_rows(options.rows)}
    Pool(options).run([job for job in wanted if job not in done])
    for found in claims(read_rows(options.rows)) if not options.map else []:
        verdict = "holds" if found["holds"] else "FALLS SHORT"
        print(f"{found['id']:45} {found['value']:10.4f} {found['compare']} {found['target']:<6} {verdict}")


class Pool:
    """Runs of the table as processes, some at a time."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.start = options, time.monotonic()
        self.gpus = options.gpus.split(",") if options.gpus else gpus()
        self.scratch = tempfile.TemporaryDirectory()
        options.rows.parent.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: list[tuple[str, int]]) -> None:
        """Run all; the result file is rewritten after each."""
        running: dict[tuple[str, int], tuple[subprocess.Popen, Path, str]] = {}
        waiting = list(jobs)
        while (waiting or running) and time.monotonic() - self.start < self.options.stop_seconds:
            while waiting and len(running) < self.options.jobs:
                used = [gpu for _, _, gpu in running.values()]
                gpu = min(self.gpus, key=used.count)
                job = waiting.pop(0)
                target = Path(self.scratch.name) / f"{len(waiting)}.json"
                running[job] = (self.begin(job, target, gpu), target, gpu)
            for job, (process, target, _) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    self.take(job, process, target)
            time.sleep(0.2)
        for process, _, _ in running.values():
            process.kill()
        if waiting or running:
            print("Stopped before", [f"{name} {seed}" for name, seed in [*running, *waiting]], flush=True)

    def begin(self, job: tuple[str, int], target: Path, gpu: str) -> subprocess.Popen:
        """Start one run."""
        o = self.options
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", job[0], str(job[1]), str(target)]
        command += ["--model", o.model, "--ours", o.ours, "--steps", str(o.steps), "--batch", str(o.batch)]
        command += ["--learning-rate", str(o.learning_rate), "--lora", str(o.lora), *["--map"] * o.map]
        command += ["--rows-train", str(o.rows_train), "--rows-test", str(o.rows_test)]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
        log = target.with_suffix(".log").open("w")
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def take(self, job: tuple[str, int], process: subprocess.Popen, target: Path) -> None:
        """Keep what a run found, or show why it found nothing."""
        if process.returncode or not target.is_file():
            tail = target.with_suffix(".log").read_text(encoding="utf-8", errors="replace")[-1500:]
            print(f"FAILED {job}: {tail}", flush=True)
            return
        fresh = json.loads(target.read_text(encoding="utf-8"))
        with self.options.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(fresh) + "\n")
        shown = {r["metric"]: round(r["value"], 4) for r in fresh if "language" not in r and r["value"] is not None}
        print(f"{time.monotonic() - self.start:5.0f} s  seed {job[1]} {job[0]:28}", shown, flush=True)
        rows = read_rows(self.options.rows)
        source = "benchmarks.mlc." + ("transfer_claims" if self.options.name == "mlc_transfer" else "no_claims")
        seeds = sorted({row["seed"] for row in rows})
        write(self.options.name, rows, source, command_line(), seeds, folder=self.options.folder)


def gpus() -> list[str]:
    """Numbers of the GPUs here, or one empty name."""
    import torch

    return [str(i) for i in range(torch.cuda.device_count())] or [""]


if __name__ == "__main__":
    main()
