"""Measure every preset, its ablations and published peers on real models; write `benchmarks/results/accuracy.json`.

    python benchmarks/accuracy/run.py                        # everything, on the GPU if there is one
    python benchmarks/accuracy/run.py --cpu-cost             # time and memory on two CPU threads: accuracy_cpu.json
    python benchmarks/accuracy/run.py --tiny --out out       # miniature on a random model, seconds

    python benchmarks/accuracy/run.py --sweep                # what decided the default: accuracy_groups.json
    python benchmarks/accuracy/run.py --variants             # what may follow it, on validation text: accuracy_variants.json

Jobs run in processes of their own. Finished jobs are kept in `--rows` (JSON lines), so an interrupted run, or one that
is cut into pieces by `--limit-seconds`, goes on where it was: jobs measured at the same commit are not repeated.
Calibration reads the first part of each text, evaluation a later one that is never calibrated on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import _results
from benchmarks._lanes import gpus, run_in_lanes
from benchmarks.accuracy.claims import claims, excess, expected
from benchmarks.accuracy.jobs import MEMORY_SHARE, SCHEMES, SLICES, Job, Plan, Text, absent, bits, perform


MODELS = ("smollm2", "qwen2.5")
COLUMNS = ("handbook", "brown")
TINY_WINDOW = 32
LEARNED_BATCH = 4  # samples a gradient step, as FlatQuant takes


# ---------------------------------------------------------------- command line
def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--models", default=",".join(MODELS), help="assets, by name (default: all)")
    add("--model-path", action="append", default=[], metavar="NAME=FOLDER", help="a model that is here already")
    add("--text-path", action="append", default=[], metavar="NAME=FILE", help="a text that is here already")
    add("--jobs", type=int, help="processes at a time (default 1); 0 runs all in this one (default of --tiny)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--threads", type=int, help="CPU threads a job (default: cores / jobs)")
    add("--only", help="methods or groups (preset, ablation, peer), with commas; full precision always runs")
    add("--schemes", help=f"with commas (default: {','.join(SCHEMES)}; tiny: w4a16,w4a4,w4a4kv4)")
    add("--samples", type=int, default=64, help="calibration samples")
    add("--seq-len", type=int, default=1024, help="tokens a calibration sample, and an evaluation window")
    add("--batch-size", type=int, default=4)
    add("--windows", type=int, default=24, help="evaluation windows of each text")
    add("--seeds", default="0", help="with commas; ablations and peers use the first")
    add(
        "--later-seeds",
        default="",
        help="more seeds of the default and of QuaRot at W4A4, with commas, once claims have theirs",
    )
    add("--learned-samples", type=int, help="calibration samples of learned methods (default: --samples)")
    add("--learned-samples-elsewhere", type=int, help="the same at other settings than W4A4 (default: as there)")
    add("--learned-epochs", type=int, help="epochs of learned methods (default: the preset's)")
    add(
        "--cpu-cost",
        action="store_true",
        help="only time and memory of the default calibration, on its default samples, on two CPU threads",
    )
    add("--learned-schemes", help="schemes at which learned methods are measured (default: all)")
    add("--learned-jobs", type=int, help="learned jobs at a time while others wait (default: no limit)")
    add(
        "--variants",
        action="store_true",
        help="variants of the default, scored on text that is neither calibrated on nor claimed",
    )
    add("--sweep", action="store_true", help="group sizes, ranks and passes of the default, at W4A4")
    add("--tiny", action="store_true", help="a random model and text, for tests")
    add("--limit-seconds", type=float, help="no job is started after it")
    add("--stop-seconds", type=float, help="running jobs are ended after it")
    add("--peers-path", help="folder put on PYTHONPATH of the peers' jobs (pip install --target)")
    add("--earlier", type=Path, help="finished jobs of another commit; their rows say so in a note")
    add("--earlier-methods", default="", help="methods taken from --earlier: such as the change since does not touch")
    add("--rows", type=Path, help="finished jobs, read and appended (default: runs/accuracy.jsonl)")
    add("--out", type=Path, help="folder of the result (default: benchmarks/results; tiny: out)")
    return made


def pairs(given: list[str], option: str) -> dict[str, str]:
    """`["a=x"]` as a dict."""
    found = {}
    for item in given:
        name, sign, path = item.partition("=")
        if not sign or not Path(path).exists():
            raise SystemExit(f"{option} must be NAME=PATH of something that exists, got {item!r}.")
        found[name] = str(Path(path).resolve())
    return found


def shown_command(arguments: list[str]) -> str:
    """The command without this machine's folders."""
    return shlex.join(["python", "benchmarks/accuracy/run.py", *(_without_folders(word) for word in arguments)])


def _without_folders(text: str) -> str:
    return re.sub(r"(?<![\w.])(?:/[\w.+@~-]+)+/(?=[\w.+@~-])", "", text)


# ---------------------------------------------------------------- what to run
def fetch_model(name: str, given: dict[str, str]) -> str:
    """Folder of a model: given, or an asset."""
    from tools.assets import fetch

    return given.get(name) or str(fetch(name))


def read_texts(given: dict[str, str]) -> tuple[Text, ...]:
    """Both texts with their ranges."""
    from tools.assets import fetch

    paths = {name: given.get(name) or str(fetch(name) / "text.txt") for name in SLICES}
    return tuple(Text(name, paths[name], *SLICES[name]) for name in SLICES)


def tiny_world(folder: Path) -> tuple[dict[str, str], tuple[Text, ...]]:
    """A random two-block model with outliers and a sink, and two texts drawn from it, written to `folder`.

    On its own samples a model is the best there is, so that rounding errors show even though it is random.
    """
    import torch

    from tests.helpers.tiny_models import SPECIAL_TOKENS, plant_outliers, plant_sink, tiny, tiny_tokenizer

    model, tokenizer = tiny("llama"), tiny_tokenizer(bos=False)
    plant_outliers(model, factor=8.0)
    plant_sink(model, factor=8.0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    generator, first, last = torch.Generator().manual_seed(0), len(SPECIAL_TOKENS), len(tokenizer)
    texts = []
    for name in SLICES:
        ids = torch.randint(first, last, (256, 1), generator=generator)
        while ids.shape[1] < TINY_WINDOW:
            with torch.no_grad():
                chances = model(input_ids=ids).logits[:, -1, first:last].softmax(-1)
            ids = torch.cat([ids, first + torch.multinomial(chances, 1, generator=generator)], 1)
        path = folder / f"{name}.txt"
        path.write_text(tokenizer.decode(ids.flatten()), encoding="utf-8")
        texts.append(Text(name, str(path), (0, 128 * TINY_WINDOW), 128 * TINY_WINDOW))
    return {"tiny": str(folder / "model")}, tuple(texts)


def make_plan(options: argparse.Namespace, models: dict[str, str], texts: tuple[Text, ...]) -> list[Job]:
    """All jobs in the order in which they shall be shown."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    schemes = tuple(
        (options.schemes or ("w4a4" if options.sweep or options.variants else ",".join(SCHEMES))).lower().split(",")
    )
    for scheme in schemes:
        bits(scheme)
    measure = {"n_samples": options.samples, "seq_len": options.seq_len, "batch_size": options.batch_size}
    measure |= {"windows": options.windows, "window": options.seq_len}
    steps = {"batch_size": min(LEARNED_BATCH, options.batch_size)}  # as published; a closed form knows no batches
    learned = {"quantize": {"epochs": options.learned_epochs} if options.learned_epochs else {}, "measure": steps}
    if options.learned_samples:
        learned["measure"] = {**steps, "n_samples": options.learned_samples}
    if options.learned_samples_elsewhere:
        learned["elsewhere"] = {**steps, "n_samples": options.learned_samples_elsewhere}
    later = tuple(int(seed) for seed in options.later_seeds.split(",") if seed)
    only = set(options.only.split(",")) if options.only else None
    jobs: list[Job] = []
    for name, path in models.items():
        common = {"model": name, "model_path": path, "texts": texts, "device": options.device}
        few = tuple(options.learned_schemes.lower().split(",")) if options.learned_schemes else None
        plan = Plan({**common, "threads": options.threads}, schemes, seeds, measure, learned, few, only, later)
        if options.cpu_cost:
            plan.cpu_cost()
        elif options.variants:
            plan.variants()
        elif options.sweep:
            plan.full_precision()
            plan.sweep(_widths(path))
        else:
            plan.full_precision()
            plan.presets()
            plan.quarots(_widths(path))
            plan.default_samples()
            plan.ablations(_widths(path))
            plan.peers()
        jobs += plan.jobs
    if only and (unknown := only - {job.method for job in jobs} - {job.group for job in jobs}):
        raise SystemExit(f"--only {sorted(unknown)} names nothing here; methods: {sorted({j.method for j in jobs})}.")
    return jobs


def _widths(path: str) -> list[int]:
    """Input sizes of a model's linears, from its config."""
    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return [config[key] for key in ("hidden_size", "intermediate_size") if key in config]


# ---------------------------------------------------------------- running
class Store:
    """Finished jobs on disk, one JSON line each; only those of this commit count."""

    def __init__(self, path: Path, commit: str):
        self.path, self.commit = path, commit
        self.lines: dict[str, dict] = {}
        self.errors: dict[str, str] = {}  # of jobs that were tried and failed: tried again, unless there is no time
        self._lock = threading.Lock()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        others = 0
        for line in text.splitlines():
            try:
                told = json.loads(line)
            except json.JSONDecodeError:  # cut off while it was written
                continue
            if "error" in told:
                self.errors.update({told["key"]: told["error"]} if told["commit"] == commit else {})
            elif told["commit"] == commit:
                self.lines[told["key"]] = told
            else:
                others += 1
        if self.lines or others:
            print(f"{path.name}: {len(self.lines)} jobs of this commit, {others} of others (not used).", flush=True)

    def take(self, path: Path, jobs: list[Job], methods: set[str]) -> None:
        """Jobs of other commits, of the named methods and not measured at this one; each row names its commit."""
        wanted = {job.key for job in jobs if job.method in methods and job.key not in self.lines}
        for told in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if told["key"] in wanted and "error" in told:
                self.errors.setdefault(told["key"], told["error"])
            elif told["key"] in wanted and told["commit"] != self.commit:
                at = f"measured at {told['commit'][:10]}"
                rows = [{**row, "note": "; ".join(filter(None, (row.get("note"), at)))} for row in told["rows"]]
                self.lines[told["key"]] = {**told, "rows": rows}

    def add(self, told: dict) -> None:
        """Keep a finished job, or why it failed."""
        with self._lock:
            if "error" in told:
                self.errors[told["key"]] = told["error"]
            else:
                self.lines[told["key"]] = told
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(told) + "\n")


def _of_model(jobs: list[Job], name: str) -> list[Job]:
    return [job for job in jobs if job.model == name]


class Runner:
    """Starts jobs, `slots` at a time, each in a process with a GPU of its own choice (round robin)."""

    def __init__(self, options: argparse.Namespace, store: Store, stamp: dict, start: float):
        self.options, self.store, self.stamp, self.start = options, store, stamp, start
        self.failures: dict[str, str] = {}
        self._lock = threading.Lock()
        self._own = threading.local()  # a lane's worker
        self._done = 0
        self._learning: set[str] = set()  # keys of learned jobs that run

    def run(self, jobs: list[Job]) -> None:
        """Run what the store does not have, what claims need first; returns when nothing runs any more."""
        waiting = [job for job in jobs if job.key not in self.store.lines]
        place = {job.key: i for name in {job.model for job in jobs} for i, job in enumerate(_of_model(jobs, name))}
        waiting.sort(key=lambda job: (job.rank, job.seed, place[job.key]))  # models by turns
        self._total = len(waiting)
        if self.options.jobs == 0:
            for job in waiting:
                self._one(job, None)
            return
        devices, most = gpus(self.options.device), self.options.learned_jobs
        self._memory = 0.92 / -(-self.options.jobs // len(devices)) if self.options.device == "cuda" else None
        run_in_lanes(waiting, self.options.jobs, devices, self._one, None if most is None else self._may_start)

    def _may_start(self, job: Job) -> bool:
        if not job.is_learned:
            return True
        free = len(self._learning) < self.options.learned_jobs
        if free:
            self._learning.add(job.key)
        return free

    def _one(self, job: Job, gpu: str | None) -> None:
        """Run one job, or say why not; its rows go to the store."""
        limit, begun = self.options.limit_seconds, time.perf_counter()
        if limit is not None and begun - self.start >= limit:
            late = f"not started: the time limit of {limit:g} s was reached"
            self.failures[job.key] = self.store.errors.get(job.key, late)
            self._learning.discard(job.key)
            return
        told = self._here(job) if gpu is None else self._process(job, gpu)
        if gpu is not None and "OutOfMemoryError" in told.get(
            "error", ""
        ):  # once more, in a process without anybody's leftovers
            self._end_worker()
            told = self._process(job, gpu)
        self._learning.discard(job.key)
        seconds = time.perf_counter() - begun
        with self._lock:
            self._done += 1
            state = told["error"] if "error" in told else "done"
            print(f"[{self._done}/{self._total}] {seconds:6.1f} s  {job.name}: {state[:200]}", flush=True)
        if "error" in told:
            self.failures[job.key] = error = _without_folders(" ".join(told["error"].split()))[:400]
            self.store.add({"key": job.key, "commit": self.store.commit, "error": error})
        else:
            self.store.add({"key": job.key, **self.stamp, "seconds": round(seconds, 2), "rows": told["rows"]})

    def _here(self, job: Job) -> dict:
        try:
            return {"rows": perform(job)}
        except Exception as error:  # as in the worker
            return {"error": f"{type(error).__name__}: {error}"}

    def _process(self, job: Job, gpu: str) -> dict:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false"}
        if self._memory is not None:
            environment.setdefault(MEMORY_SHARE, f"{self._memory:.4f}")
        if job.threads:
            environment["OMP_NUM_THREADS"] = str(job.threads)
        if job.group == "peer" and self.options.peers_path:
            path = str(Path(self.options.peers_path).resolve())
            environment["PYTHONPATH"] = os.pathsep.join([path, *filter(None, [os.environ.get("PYTHONPATH")])])
        worker = getattr(self._own, "worker", None)
        if worker is None or worker.environment != environment:
            self._end_worker()
            worker = self._own.worker = Worker(environment)
        stop = self.options.stop_seconds
        left = None if stop is None else max(1.0, stop - (time.perf_counter() - self.start))
        told = worker.ask(job, left)
        if (
            told is None or not worker.alive() or job.device == "cpu"
        ):  # the peak of memory of a CPU job is its process's
            self._end_worker()
        return {"error": f"ended after {stop:g} s of the run"} if told is None else told

    def _end_worker(self) -> None:
        """End the lane's process, if it has one."""
        worker = getattr(self._own, "worker", None)
        if worker is not None:
            worker.end()
            self._own.worker = None


class Worker:
    """A process that does one job after the other; it ends when its lane does."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        self._count = 0
        command = [sys.executable, "-m", "benchmarks.accuracy.jobs"]
        with self._log.open("wb") as sink:
            self._process = subprocess.Popen(
                command, cwd=_results.ROOT, env=environment, stdin=subprocess.PIPE, stdout=sink, stderr=sink
            )

    def ask(self, job: Job, seconds: float | None) -> dict | None:
        """Rows or the error of a job; `None` where the time was over first."""
        self._count += 1
        result = Path(self._folder.name) / f"{self._count}.json"
        line = json.dumps({"job": dataclasses.asdict(job), "result": str(result)})
        begun = time.perf_counter()
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it is dead already
            pass
        while not result.is_file():
            if self._process.poll() is not None and not result.is_file():
                tail = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
                return {"error": f"the process ended with {self._process.returncode}: {' | '.join(tail)}"}
            if seconds is not None and time.perf_counter() - begun > seconds:
                return None
            time.sleep(0.1)
        return json.loads(result.read_text(encoding="utf-8"))

    def alive(self) -> bool:
        """Whether it takes another job."""
        return self._process.poll() is None

    def end(self) -> None:
        """End the process and remove its files."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._folder.cleanup()

    def __del__(self) -> None:
        if self.alive():
            self.end()


# ---------------------------------------------------------------- the result
def assemble(jobs: list[Job], store: Store, failures: dict[str, str]) -> list[dict]:
    """Rows of all planned jobs, measured or not, and the excesses that follow from them."""
    rows: list[dict] = []
    for job in jobs:
        told = store.lines.get(job.key)
        rows += told["rows"] if told else absent(job, failures.get(job.key, "not run"))
    return rows + derived(rows)


def derived(rows: list[dict]) -> list[dict]:
    """Excess over full precision of each quantized model, and what 4-bit activations add to the same at W4A16."""
    found = []
    kept = ("model", "group", "method", "setting")
    heads = dict.fromkeys(tuple(row[key] for key in kept) for row in rows if row["metric"] == "nll")
    for head in heads:
        model, group, method, setting = head
        if group == "full":
            continue
        base = excess(rows, model, method, "w4a16")
        for seed, value in excess(rows, model, method, setting).items():
            fields = dict(zip(kept, head, strict=True))
            found.append({**fields, "metric": "excess_nll", "value": value, "seed": seed})
            if setting == "w4a4" and seed in base:
                gap = {"metric": "excess_nll_over_w4a16", "value": value - base[seed], "seed": seed}
                found.append({**fields, **gap})
    return found


def write(name: str, rows: list[dict], store: Store, jobs: list[Job], seeds: list[int], out: Path) -> Path:
    """The result file, stamped with every command and machine that its rows come from."""
    used = [store.lines[job.key] for job in jobs if job.key in store.lines]
    commands = "; ".join(dict.fromkeys(line["command"] for line in used))
    machines = " and ".join(dict.fromkeys(line["machine"] for line in used))
    module = "benchmarks.accuracy.no_claims" if name.endswith("variants") else "benchmarks.accuracy.claims"
    return _results.write(name, rows, module, commands, seeds, machine=machines, folder=out)


def report(rows: list[dict], problems: list[str], wanted: list[str]) -> None:
    """The table of all methods, then the claims: the last things printed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100, highlight=False, soft_wrap=False)
    methods = dict.fromkeys((row["model"], row["method"], row["setting"]) for row in rows)
    for model in dict.fromkeys(row["model"] for row in rows):
        base = {r["text"]: r["value"] for r in rows if r["model"] == model and r["method"] == "fp" and "text" in r}
        stated = ", ".join(f"{text} {value:.4f}" for text, value in base.items() if value is not None)
        table = Table(
            title=f"{model}: full precision {stated}; excess nats", box=None, padding=(0, 1), title_justify="left"
        )
        for column in ("method", "setting", *COLUMNS, "mean", "size", "s", "GB"):
            table.add_column(column, justify="left" if column in ("method", "setting") else "right", no_wrap=True)
        for _, method, setting in (key for key in methods if key[0] == model and key[1] != "fp"):
            cells = [_mean(excess(rows, model, method, setting, text).values()) for text in (*COLUMNS, None)]
            cells += [
                _metric(rows, model, method, setting, name)
                for name in ("size_ratio", "calibration_seconds", "peak_gb")
            ]
            table.add_row(method, setting, *cells)
        console.print(table)
    for line in problems:
        console.print(f"not measured: {line}"[:180], style="yellow", markup=False, soft_wrap=True)
    made = claims(rows)
    for entry in made:
        verdict = "pass       " if entry["holds"] else "falls short"
        style = "green" if entry["holds"] else "red"
        text = f"{verdict} {entry['id']} {entry['value']:.4g} {entry['compare']} {entry['target']:g}"
        console.print(text, style=style, markup=False, soft_wrap=True)
    for name in wanted:
        if name not in {entry["id"] for entry in made}:
            console.print(f"not made    {name}", style="yellow", markup=False, soft_wrap=True)


def _mean(values) -> str:
    values = list(values)
    return f"{sum(values) / len(values):.4f}" if values else "-"


def _metric(rows: list[dict], model: str, method: str, setting: str, metric: str) -> str:
    wanted = {"model": model, "method": method, "setting": setting, "metric": metric}
    values = [r["value"] for r in rows if r["value"] is not None and all(r.get(k) == v for k, v in wanted.items())]
    return f"{sum(values) / len(values):.3g}" if values else ""


def main(arguments: list[str] | None = None) -> int:
    """0 when all of ours was measured and every claim could be made, held or not; peers may be missing."""
    start = time.perf_counter()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    commit, dirty = _results.commit_and_dirty()
    with tempfile.TemporaryDirectory() as scratch:
        models, texts = _prepare(options, Path(scratch))
        jobs = make_plan(options, models, texts)
        store = Store(options.rows, commit + ("-dirty" if dirty else ""))
        if options.earlier is not None:
            store.take(options.earlier, jobs, set(options.earlier_methods.split(",")))
        stamp = {"commit": store.commit, "machine": _results.machine_name(), "command": shown_command(arguments)}
        runner = Runner(options, store, stamp, start)
        print(f"{len(jobs)} jobs, {options.jobs or 'one process'} at a time, on {options.device}.", flush=True)
        runner.run(jobs)
    kinds = {"cpu": options.cpu_cost, "variants": options.variants, "groups": options.sweep}
    name = "_".join(("accuracy", *(kind for kind, asked in kinds.items() if asked)))
    failures = runner.failures
    rows = assemble(jobs, store, failures)
    absent_jobs = [job for job in jobs if job.key not in store.lines]
    problems = [f"{job.name}: {failures.get(job.key, 'not run')}" for job in absent_jobs]
    wanted = [] if any(kinds.values()) or options.only else expected(models)
    if len(problems) < len(jobs):
        seeds = sorted({row["seed"] for row in rows if row["value"] is not None})
        path = write(name, rows, store, jobs, seeds, options.out)
        print(
            f"Wrote {path.name}: {len(rows)} rows, {len(problems)} jobs missing, {time.perf_counter() - start:.0f} s."
        )
    report(rows, problems, wanted)
    missing = set(wanted) - {entry["id"] for entry in claims(rows)}
    return int(bool(missing or any(job.group != "peer" for job in absent_jobs)))


def _prepare(options: argparse.Namespace, scratch: Path) -> tuple[dict[str, str], tuple[Text, ...]]:
    """Fill in defaults; models and texts."""
    import torch

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() and not (options.tiny or options.cpu_cost) else "cpu"
    if options.tiny:
        options.samples, options.seq_len, options.batch_size, options.windows = 16, TINY_WINDOW, 8, 32
        options.schemes = options.schemes or "w4a16,w4a4,w4a4kv4"
        options.learned_epochs, options.jobs = options.learned_epochs or 1, options.jobs or 0
        options.out = options.out or _results.ROOT / "out"
        options.rows = options.rows or scratch / "rows.jsonl"
        return tiny_world(scratch)
    if options.cpu_cost:
        from optimum_freeact.config_fields import DEFAULTS

        options.device, options.models, options.jobs, options.threads = "cpu", MODELS[0], 1, 2
        options.samples, options.seq_len, options.batch_size = (
            DEFAULTS[name] for name in ("n_samples", "seq_len", "batch_size")
        )
    options.jobs = 1 if options.jobs is None else options.jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.threads = options.threads or max(1, cores // max(1, options.jobs))
    options.out = options.out or _results.RESULTS
    options.rows = options.rows or _results.ROOT / "runs" / "accuracy.jsonl"
    given = pairs(options.model_path, "--model-path")
    return {name: fetch_model(name, given) for name in options.models.split(",")}, read_texts(
        pairs(options.text_path, "--text-path")
    )


if __name__ == "__main__":
    sys.exit(main())
