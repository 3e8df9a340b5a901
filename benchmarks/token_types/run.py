"""Make models with several token types, quantize them every way, and write `benchmarks/results/token_types.json`.

    python benchmarks/token_types/run.py                      # everything, on all GPUs
    python benchmarks/token_types/run.py --models diffusion   # one model
    python benchmarks/token_types/run.py --tiny --out out     # miniature of random models, on the CPU, seconds

Training comes first, one model a GPU; then each method and seed is a process of its own, `--jobs` at a time. Finished
ones are kept in `--rows` (JSON lines): an interrupted run, or one cut by `--stop-seconds`, goes on where it was as long as
the trained models are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import _results
from benchmarks._lanes import gpus, run_in_lanes
from benchmarks.token_types.claims import LOSS, MODELS, claims, losses, won_back
from benchmarks.token_types.jobs import Job, perform
from benchmarks.token_types.methods import ABLATIONS, DRAWS_NOTHING, FP, LEARNED, METHODS, OURS, PUBLISHED


TIMING_SECONDS = 170.0  # the timing's limit: kernels are compiled first


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--models", default=",".join(MODELS), help="which (default: all)")
    add("--methods", help="names, with commas (default: all)")
    add("--no-ablations", action="store_true", help="the table's methods only")
    add("--no-timing", action="store_true", help="do not time the layers")
    add("--seeds", default="0,1,2", help="of calibration (default 0,1,2); ablations take the first")
    add("--source", default=None, metavar="FOLDER", help="SmolLM2, if it is here already")
    add("--text-path", action="append", default=[], metavar="NAME=FILE", help="a text that is here already")
    add("--pictures", default=None, metavar="FOLDER", help="the pictures, if they are here already")
    add("--work", type=Path, default=None, metavar="FOLDER", help="trained models (default runs/token_types)")
    add("--rows", type=Path, default=None, metavar="FILE", help="finished jobs (default: in --work)")
    add("--out", type=Path, default=None, metavar="FOLDER", help="where the result is written")
    add("--jobs", type=int, default=2, help="processes at a time (default 2); 0 runs all in this one")
    add("--threads", type=int, default=None, help="CPU threads a job")
    add("--device", choices=("cpu", "cuda"), default=None)
    add("--train-seconds", type=float, default=None, help="cut training, the schedule follows")
    add("--stop-seconds", type=float, default=None, help="end everything by then, and write what is there")
    add("--epochs", type=int, default=None, help="of learned calibrations (default: the preset's 15)")
    add("--tiny", action="store_true", help="miniature on the CPU")
    return made


FULL = {
    "diffusion": {
        "train": {"steps": 900, "batch": 64, "length": 512},
        **{"windows": 24, "window": 512, "score_batch": 12, "generate": [96, 48]},
        **{"pool": 96, "n_samples": 32, "seq_len": 512, "batch_size": 4},
    },
    "vlm": {
        "train": {"steps": 1500, "batch": 96},
        **{"scenes": 384, "score_batch": 64, "exact": 192, "candidates": 8},
        **{"pool": 24, "n_samples": 8, "batch_size": 1, "per_input": 16},
    },
    "three_types": {
        "train": {"steps": 1500, "batch": 96},
        **{"scenes": 384, "score_batch": 64, "exact": 192, "candidates": 0},
        **{"pool": 24, "n_samples": 8, "batch_size": 1, "per_input": 16},
    },
}
TINY_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = {
    "diffusion": {
        "train": {"steps": 4, "batch": 8, "length": 32},
        **{"windows": 4, "window": 32, "score_batch": 4, "generate": [8, 4]},
        **{"pool": 16, "n_samples": 8, "seq_len": 32, "batch_size": 4, "mask_id": 103},
    },
    "vlm": {
        "train": {"steps": 4, "batch": 8},
        **{"scenes": 8, "score_batch": 8, "exact": 4, "candidates": 3},
        **{"pool": 8, "n_samples": 4, "batch_size": 2, "per_input": 2, "mask_id": 103, "sight": TINY_SIGHT},
        "ids": {"image_id": 102, "start_id": 1, "end_id": 2},
    },
    "three_types": {
        "train": {"steps": 4, "batch": 8},
        **{"scenes": 8, "score_batch": 8, "exact": 4, "candidates": 0},
        **{"pool": 8, "n_samples": 4, "batch_size": 2, "per_input": 2, "mask_id": 103, "sight": TINY_SIGHT},
        "ids": {"image_id": 102, "start_id": 1, "end_id": 2},
    },
}


def timing(options: argparse.Namespace) -> list[Job]:
    """The time of three types, on a GPU that nothing else uses; on a CPU before anything else is quantized."""
    if options.no_timing:
        return []
    measure = {"tokens": [1, 16, 2048], "shapes": ["135m", "1b", "8b"]}
    measure = {"tokens": [4], "shapes": ["135m"], "repeats": 2} if options.tiny else measure
    seed = int(options.seeds.split(",")[0])
    common = {"folder": "", "device": options.device, "threads": options.threads, "group": "time"}
    return [Job("layers", "freeact", ("w4a4",), seed, {}, measure, **common)]


def plan(options: argparse.Namespace, inputs: dict) -> tuple[list[Job], list[Job]]:
    """Training jobs, and those that need them."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    chosen = options.methods.split(",") if options.methods else None
    training, jobs = [], []
    for model in options.models.split(","):
        measure = {**(TINY if options.tiny else FULL)[model], **inputs}
        if options.train_seconds:
            measure["train"] = {**measure["train"], "seconds": options.train_seconds}
        common = {"model": model, "folder": str(options.work / model), "device": options.device}
        common |= {"threads": options.threads, "measure": measure}
        training.append(Job(method="train", settings=("w16a16",), seed=seeds[0], quantize={}, group="train", **common))
        jobs.append(Job(method=FP[0], settings=(FP[1],), seed=seeds[0], quantize={}, group="full", **common))
        for method, quantize in METHODS.items():
            group = "ablation" if method in ABLATIONS else "method"
            if (options.no_ablations and group == "ablation") or (chosen and method not in chosen):
                continue
            if options.epochs and method in LEARNED:
                quantize = {**quantize, "epochs": options.epochs}
            few = group == "ablation" or method in DRAWS_NOTHING
            for seed in seeds[:1] if few else seeds:  # the cache's means are measured first, then it is left out
                settings = ("w4a4",) if group == "ablation" else ("w4a4kv4", "w4a4")
                jobs.append(Job(method=method, settings=settings, seed=seed, quantize=quantize, group=group, **common))
    claimed = {"flatquant": 1, "freeact-paper": 1, **dict.fromkeys(OURS, 2), FP[0]: 0}
    order = {**dict.fromkeys(PUBLISHED, 3), **claimed}
    jobs.sort(key=lambda job: (order.get(job.method, 4), job.seed))  # what claims need, the longest of it first
    return training, jobs


class Runner:
    """Runs jobs, each in a process on a GPU of its own choice (round robin), and keeps what they told."""

    def __init__(self, options: argparse.Namespace, stamp: str):
        self.options, self.stamp, self.start = options, stamp, time.perf_counter()
        self.told: dict[str, list[dict]] = {}
        self.failures: dict[str, str] = {}
        self._lock = threading.Lock()
        if options.rows.is_file():
            for line in options.rows.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if entry["commit"] == stamp:
                    self.told[entry["key"]] = entry["rows"]

    def run(self, jobs: list[Job], slots: int) -> None:
        """Run what was not run yet; returns when nothing runs any more."""
        waiting = [job for job in jobs if job.key not in self.told]
        if slots == 0:
            for job in waiting:
                begun = time.perf_counter()
                self._keep(job, self._here(job), begun)
            return
        run_in_lanes(waiting, slots, gpus(self.options.device), self._one)

    def gpu_count(self) -> int:
        """How many can train at a time."""
        return len(gpus(self.options.device))

    def _one(self, job: Job, gpu: str) -> None:
        begun = time.perf_counter()
        left = None if self.options.stop_seconds is None else self.options.stop_seconds - (begun - self.start)
        if job.group == "time":
            left = min(TIMING_SECONDS, TIMING_SECONDS if left is None else left)
        told = {"error": "not started: the time was up"} if left is not None and left < 5 else None
        self._keep(job, told or self._process(job, gpu, left), begun)

    def _here(self, job: Job) -> dict:
        try:
            return {"rows": perform(job)}
        except Exception as error:  # as in the worker
            if os.environ.get("CONCORD_RAISE"):
                raise
            return {"error": f"{type(error).__name__}: {error}"}

    def _process(self, job: Job, gpu: str, left: float | None) -> dict:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false"}
        if job.threads:
            environment["OMP_NUM_THREADS"] = str(job.threads)
        with tempfile.TemporaryDirectory() as scratch:
            result, log = Path(scratch) / "result.json", Path(scratch) / "log"
            command = [sys.executable, "-m", "benchmarks.token_types.jobs", str(result)]
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    command, cwd=_results.ROOT, env=environment, stdin=subprocess.PIPE, stdout=sink, stderr=sink
                )
                try:
                    process.communicate(json.dumps(dataclasses.asdict(job)).encode(), timeout=left)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    return {"error": "ended: the time was up"}
            kept = self.options.work / "logs" / f"{job.name.replace(' ', '_').replace('/', '_')}.log"
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, kept)
            if result.is_file():
                return json.loads(result.read_text(encoding="utf-8"))
            tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            return {"error": f"the process ended with {process.returncode}: {' | '.join(tail)}"}

    def _keep(self, job: Job, told: dict, begun: float) -> None:
        seconds = time.perf_counter() - begun
        with self._lock:
            if "error" in told:
                self.failures[job.key] = " ".join(told["error"].split())[:400]
                print(f"{seconds:6.1f} s  {job.name}: {self.failures[job.key][:200]}", flush=True)
                return
            self.told[job.key] = told["rows"]
            shown = [f"{r['value']:.3f}" for r in told["rows"] if r["metric"] == LOSS.get(job.model)]
            print(f"{seconds:6.1f} s  {job.name}: {' '.join(shown) or 'done'}", flush=True)
            self.options.rows.parent.mkdir(parents=True, exist_ok=True)
            with self.options.rows.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": job.key, "commit": self.stamp, "rows": told["rows"]}) + "\n")


def assemble(jobs: list[Job], runner: Runner) -> list[dict]:
    """Rows of all jobs; one without a value and with the reason for each that gave none."""
    rows: list[dict] = []
    for job in jobs:
        if job.key in runner.told:
            rows += runner.told[job.key]
            continue
        for setting in job.settings:
            mode = {"mode": "cached" if "kv" in setting else "whole"}
            head = {"model": job.model, "group": job.group, "method": job.method, "setting": setting, **mode}
            note = runner.failures.get(job.key, "not run")
            metric = LOSS.get(job.model, "three_types_time_ratio")
            rows.append({**head, "metric": metric, "value": None, "seed": job.seed, "note": note})
    return rows + excesses(rows)


def excesses(rows: list[dict]) -> list[dict]:
    """Loss over full precision, by model, method, setting and seed; and the share of FlatQuant's won back."""
    found = []
    heads = dict.fromkeys(
        (r["model"], r["group"], r["method"], r["setting"]) for r in rows if r["metric"] in LOSS.values()
    )
    for model, group, method, setting in heads:
        if group in ("full", "train"):
            continue
        base = losses(rows, model, FP[0], setting)
        head = {"model": model, "group": group, "method": method, "setting": setting}
        for seed, value in losses(rows, model, method, setting).items() if base else ():
            found.append({**head, "metric": "excess_loss", "value": value - next(iter(base.values())), "seed": seed})
        share = won_back(rows, model, method, setting)
        if share is not None:
            found.append({**head, "metric": "gap_won_back", "value": share, "seed": 0})
    return found


def report(rows: list[dict], failures: dict[str, str]) -> None:
    """Losses, then claims: the last things printed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, highlight=False)
    for model in dict.fromkeys(row["model"] for row in rows if row["model"] in LOSS):
        table = Table(title=f"{model}: {LOSS[model]}", box=None, padding=(0, 1), title_justify="left")
        for column in ("method", "setting", "loss", "excess", "won back", "seeds", "size", "s"):
            table.add_column(column, no_wrap=True)
        heads = dict.fromkeys(
            (r["method"], r["setting"]) for r in rows if r["model"] == model and r["method"] != "train"
        )
        for method, setting in heads:
            shown = ("w4a4", "w4a4kv4") if method == FP[0] else (setting,)
            for one in shown:
                values = list(losses(rows, model, method, one).values())
                loss = sum(values) / len(values) if values else None
                base = losses(rows, model, FP[0], one)
                excess = None if loss is None or not base else loss - next(iter(base.values()))
                cells = [loss, excess, won_back(rows, model, method, one)]
                told = [f"{cell:.4f}" if cell is not None else "-" for cell in cells]
                more = [_metric(rows, model, method, name) for name in ("size_ratio", "calibration_seconds")]
                table.add_row(method, one, *told, str(len(values)), *more)
        console.print(table)
    for reason in dict.fromkeys(failures.values()):
        console.print(f"not measured: {reason}"[:200], style="yellow", markup=False)
    for entry in claims(rows):
        verdict = "pass       " if entry["holds"] else "falls short"
        line = f"{verdict} {entry['id']} {entry['value']:.4g} {entry['compare']} {entry['target']:g}"
        console.print(line, style="green" if entry["holds"] else "red", markup=False)


def _metric(rows: list[dict], model: str, method: str, metric: str) -> str:
    wanted = {"model": model, "method": method, "metric": metric}
    values = [r["value"] for r in rows if r["value"] is not None and all(r.get(k) == v for k, v in wanted.items())]
    return f"{sum(values) / len(values):.3g}" if values else ""


def main(arguments: list[str] | None = None) -> int:
    """0 when everything planned was measured."""
    options = parser().parse_args(arguments)
    unknown = sorted(set(options.methods.split(",") if options.methods else []) - set(METHODS))
    if unknown:
        raise SystemExit(f"--methods {unknown} names nothing here; methods: {sorted(METHODS)}.")
    with tempfile.TemporaryDirectory() as scratch:
        inputs = prepare(options, Path(scratch))
        commit, dirty = _results.commit_and_dirty()
        training, jobs = plan(options, inputs)
        runner = Runner(options, commit + ("-dirty" if dirty else ""))
        timed = timing(options)
        print(f"{len(training)} models to make, {len(jobs)} jobs, on {options.device}.", flush=True)
        first = [*training, *timed]  # each has a GPU to itself
        runner.run(first, min(len(first), runner.gpu_count()) if options.jobs else 0)
        made = {job.model for job in training if job.key in runner.told}
        runner.run([job for job in jobs if job.model in made], options.jobs)
    rows = assemble([*timed, *training, *jobs], runner)
    if any(row["value"] is not None for row in rows):
        seeds = [int(seed) for seed in options.seeds.split(",")]
        path = _results.write(
            "token_types", rows, "benchmarks.token_types.claims", _results.command_line(), seeds, folder=options.out
        )
        print(f"Wrote {path.name}: {len(rows)} rows, {time.perf_counter() - runner.start:.0f} s.")
    report(rows, runner.failures)
    return int(any(job.key not in runner.told for job in [*timed, *training, *jobs]))


def prepare(options: argparse.Namespace, scratch: Path) -> dict:
    """Fill in defaults; returns where the inputs are."""
    import torch

    if options.tiny:
        from benchmarks.token_types.tiny import tiny_inputs

        options.device, options.jobs = "cpu", 0
        options.work = options.work or scratch / "work"
        options.out = options.out or _results.ROOT / "out"
        options.rows = options.rows or options.work / "rows.jsonl"
        options.epochs = options.epochs or 1
        return tiny_inputs(scratch)
    from tools import assets

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.work = (options.work or _results.ROOT / "runs" / "token_types").resolve()
    options.rows = options.rows or options.work / "rows.jsonl"
    options.out = options.out or _results.RESULTS
    given = dict(one.split("=", 1) for one in options.text_path)
    texts = {name: given.get(name) or str(assets.fetch(name) / "text.txt") for name in ("handbook", "brown")}
    inputs = {"source": str(Path(options.source or assets.fetch("smollm2")).resolve())}
    inputs["texts"] = {name: str(Path(path).resolve()) for name, path in texts.items()}
    if set(options.models.split(",")) - {"diffusion"}:
        inputs["pictures"] = str(Path(options.pictures or assets.fetch("pictures")).resolve())
    return inputs


if __name__ == "__main__":
    sys.exit(main())
