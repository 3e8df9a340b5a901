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
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.claims import claims, expected
from benchmarks.accuracy.jobs import SCHEMES, SLICES, Job, Text, bits
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.report import assemble, report, write
from benchmarks.accuracy.runner import Runner, Store, without_folders
from tools import result_files


MODELS = ("smollm2", "qwen2.5")
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
    return shlex.join(["python", "benchmarks/accuracy/run.py", *(without_folders(word) for word in arguments)])


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


# ---------------------------------------------------------------- all of it
def main(arguments: list[str] | None = None) -> int:
    """0 when all of ours was measured and every claim could be made, held or not; peers may be missing."""
    start = time.perf_counter()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    commit, dirty = result_files.commit_and_dirty()
    with tempfile.TemporaryDirectory() as scratch:
        models, texts = _prepare(options, Path(scratch))
        jobs = make_plan(options, models, texts)
        store = Store(options.rows, commit + ("-dirty" if dirty else ""))
        if options.earlier is not None:
            store.take(options.earlier, jobs, set(options.earlier_methods.split(",")))
        stamp = {"commit": store.commit, "machine": result_files.machine_name(), "command": shown_command(arguments)}
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
        options.out = options.out or result_files.ROOT / "out"
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
    options.out = options.out or result_files.RESULTS
    options.rows = options.rows or result_files.ROOT / "runs" / "accuracy.jsonl"
    given = pairs(options.model_path, "--model-path")
    return {name: fetch_model(name, given) for name in options.models.split(",")}, read_texts(
        pairs(options.text_path, "--text-path")
    )


if __name__ == "__main__":
    sys.exit(main())
