"""Make models with several token types, quantize them every way, and write `benchmarks/results/token_types.json`.

    python benchmarks/token_types/run.py                      # everything, on all GPUs
    python benchmarks/token_types/run.py --models diffusion   # one model
    python benchmarks/token_types/run.py --tiny --out out     # miniature of random models, on the CPU, seconds

Training comes first; as soon as a model is there, its methods and seeds are run, `--jobs` processes at a time, what claims
need before the rest. Finished ones are kept in `--rows` (JSON lines): an interrupted run, or one cut by `--stop-seconds`,
goes on where it was as long as the trained models are there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.token_types.claims import MODELS
from benchmarks.token_types.methods import METHODS
from benchmarks.token_types.plan import plan, timing
from benchmarks.token_types.runner import Runner
from benchmarks.token_types.table import assemble, report
from tools import result_files


WRITE_EVERY = 30.0  # seconds
PLACES = ("--source", "--text-path", "--pictures", "--work", "--rows", "--out")


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--models", default=",".join(MODELS), help="which (default: all)")
    add("--methods", help="names, with commas (default: all)")
    add("--name", default="token_types", help="of the result; one with another name derives no claims")
    add("--no-ablations", action="store_true", help="the table's methods only")
    add("--no-timing", action="store_true", help="do not time the layers")
    add("--seeds", default="0,1,2", help="of calibration (default 0,1,2); controls and ablations take the first")
    add("--source", default=None, metavar="FOLDER", help="SmolLM2, if it is here already")
    add("--text-path", action="append", default=[], metavar="NAME=FILE", help="a text that is here already")
    add("--pictures", default=None, metavar="FOLDER", help="the pictures, if they are here already")
    add("--work", type=Path, default=None, metavar="FOLDER", help="trained models (default runs/token_types)")
    add("--rows", type=Path, default=None, metavar="FILE", help="finished jobs (default: in --work)")
    add("--out", type=Path, default=None, metavar="FOLDER", help="where the result is written")
    add(
        "--jobs",
        default=None,
        help="processes at a time (default 2), or on each GPU as in 9,5; 0 runs all in this one",
    )
    add("--threads", type=int, default=None, help="CPU threads a job")
    add("--device", choices=("cpu", "cuda"), default=None)
    add("--train-seconds", default=None, help="cut training, the schedule follows; one number, or model=number, ...")
    add("--stop-seconds", type=float, default=None, help="end everything by then, and write what is there")
    add("--epochs", type=int, default=None, help="of learned calibrations (default: the preset's 15)")
    add("--tiny", action="store_true", help="miniature on the CPU")
    return made


def main(arguments: list[str] | None = None) -> int:
    """0 when everything planned was measured."""
    options = parser().parse_args(arguments)
    unknown = sorted(set(options.methods.split(",") if options.methods else []) - set(METHODS))
    if unknown:
        raise SystemExit(f"--methods {unknown} names nothing here; methods: {sorted(METHODS)}.")
    with tempfile.TemporaryDirectory() as scratch:
        inputs = prepare(options, Path(scratch))
        commit, dirty = result_files.commit_and_dirty()
        training, jobs = plan(options, inputs)
        timed = timing(options)
        everything = [job for job in [*timed, *training, *jobs] if job.group != "warm"]
        written = 0.0

        def keep(now: bool = False) -> None:
            """Write what there is, not too often, so that a run that is killed leaves its result."""
            nonlocal written
            if now or time.perf_counter() - written > WRITE_EVERY:
                written = time.perf_counter()
                try:
                    save(options, assemble(everything, runner))
                except Exception as error:  # the rows are kept in any case
                    print(f"The result was not written: {type(error).__name__}: {error}", flush=True)

        runner = Runner(options, commit + ("-dirty" if dirty else ""), keep)
        print(f"{len(training)} models to make, {len(jobs)} jobs, on {options.device}.", flush=True)
        runner.run([*training, *timed, *jobs], options.jobs)
        keep(now=True)
    rows = assemble(everything, runner)
    print(f"{len(rows)} rows, {time.perf_counter() - runner.start:.0f} s.")
    report(rows, runner.failures)
    return int(any(job.key not in runner.told for job in everything))


def save(options: argparse.Namespace, rows: list[dict]) -> None:
    """Write the result, if anything was measured."""
    if any(row["value"] is not None for row in rows):
        seeds = [int(seed) for seed in options.seeds.split(",")]
        source = "claims" if options.name == "token_types" else "no_claims"
        result_files.write(
            options.name, rows, f"benchmarks.token_types.{source}", command(), seeds, folder=options.out
        )


def command() -> str:
    """What was run, without the places where things lie."""
    return result_files.without_places(result_files.command_line(), PLACES)


def slots(given: str | None, default: int) -> int | list[int]:
    """`--jobs` as a number, or one for each GPU."""
    numbers = [int(part) for part in given.split(",")] if given else [default]
    return numbers[0] if len(numbers) == 1 else numbers


def prepare(options: argparse.Namespace, scratch: Path) -> dict:
    """Fill in defaults; returns where the inputs are."""
    import torch

    if options.tiny:
        from benchmarks.token_types.tiny import tiny_inputs

        options.device, options.jobs = "cpu", slots(options.jobs, 0)
        options.work = options.work or scratch / "work"
        options.out = options.out or result_files.ROOT / "out"
        options.rows = options.rows or options.work / "rows.jsonl"
        options.epochs = options.epochs or 1
        return tiny_inputs(scratch)
    from tools import assets

    options.jobs = slots(options.jobs, 2)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.work = (options.work or result_files.ROOT / "runs" / "token_types").resolve()
    options.rows = options.rows or options.work / "rows.jsonl"
    options.out = options.out or result_files.RESULTS
    given = dict(one.split("=", 1) for one in options.text_path)
    texts = {name: given.get(name) or str(assets.fetch(name) / "text.txt") for name in ("handbook", "brown")}
    inputs = {"source": str(Path(options.source or assets.fetch("smollm2")).resolve())}
    inputs["texts"] = {name: str(Path(path).resolve()) for name, path in texts.items()}
    if set(options.models.split(",")) - {"diffusion"}:
        inputs["pictures"] = str(Path(options.pictures or assets.fetch("pictures")).resolve())
    return inputs


if __name__ == "__main__":
    sys.exit(main())
