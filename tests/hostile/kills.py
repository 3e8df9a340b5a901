"""Kill -9 at random points of long jobs, then run the same command again: is the result that of an undisturbed run?

    python -m tests.hostile.kills JOB,... FIRST_SEED TRIALS KILLS      prints one JSON object for each trial

Each attempt is a forked process (imports are done once) that is killed either at a random moment or at a random one of
its file operations: just before it opens a file for writing, renames, makes or removes something. Those are the points
where a half-written result could be left.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

from optimum_freeact import cli as freeact
from tests.helpers.tiny_models import tiny, tiny_tokenizer
from tests.merge.tiny import build, save, texts, write_texts
from tests.mlc.conftest import byte_tokenizer, rows, tiny_llama


@dataclass(frozen=True)
class Job:
    """A long command.

    Args:
        prepare: fills a folder with inputs.
        run: the command, in that folder; returns an exit code. Called again after a kill.
        outputs: folders that must be whole whenever they look finished.
        marker: file whose presence makes an output look finished.
    """

    prepare: Callable[[Path], None]
    run: Callable[[Path], int]
    outputs: tuple[str, ...]
    marker: str


# ---------------------------------------------------------------- the jobs
def _prepare_calibration(folder: Path) -> None:
    tiny("llama", num_hidden_layers=4).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("some words to calibrate on, again and again, 0123456789\n" * 40)


def _calibrate(folder: Path) -> int:
    command = [
        "quantize",
        "model",
        "out",
        "--dataset",
        "texts.txt",
        "--resume-dir",
        "blocks",
        "--quiet",
        "--overwrite",
    ]
    return freeact.main([*command, "--n-samples", "8", "--seq-len", "32"])


def _prepare_training(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tiny_llama(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    table = rows(8)
    (folder / "rows.jsonl").write_text("".join(json.dumps({n: table[n][i] for n in table}) + "\n" for i in range(8)))


TRAINING = """--dataset_name=rows.jsonl --model_name_or_path=model --output_dir=out --max_steps=5 --save_steps=1 --use_cpu
--report_to=none --bf16=false --per_device_train_batch_size=2 --learning_rate=0.01 --mlc_layer=2 --mlc_center=true
--save_total_limit=2 --disable_tqdm=true --resume_from_checkpoint=last --gradient_checkpointing=false""".split()


def _train(folder: Path) -> int:
    from trl_mlc import cli

    return cli.main(["dpo", *TRAINING])


def _prepare_pair(folder: Path) -> None:
    for seed, name in enumerate(("target", "donor")):
        save(build(seed=seed, num_hidden_layers=3), folder / name)
    write_texts(folder / "texts.txt", texts(60))
    recipe = {
        "merge_method": "transport",
        "base_model": "target",
        "models": [{"model": "donor"}],
        "parameters": {"alpha": 0.5, "gate": "off"},
        "calibration": {"dataset": "texts.txt", "rows": 300, "max_length": 64},
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))


def _plan(folder: Path) -> int:
    from mergekit_ot import cli

    return cli.main(["plan", "recipe.yml", "--plans", "plans", "--quiet"])


def _prepare_merge(folder: Path) -> None:
    _prepare_pair(folder)
    with _inside(folder):
        _forked(lambda: _plan(folder))


def _merge(folder: Path) -> int:
    from mergekit_ot import cli

    return cli.main(["run", "recipe.yml", "out", "--plans", "plans", "--quiet"])


JOBS = {
    "calibration": Job(_prepare_calibration, _calibrate, ("out",), "config.json"),
    "training": Job(_prepare_training, _train, ("out",), "config.json"),
    "planning": Job(_prepare_pair, _plan, ("plans",), "plans.json"),
    "merging": Job(_prepare_merge, _merge, ("out",), "config.json"),
}


# ---------------------------------------------------------------- results
def result(folder: Path, job: Job) -> dict[str, str]:
    """Hash of every tensor of every output; empty for an output that does not look finished."""
    found = {}
    for name in job.outputs:
        place = folder / name
        if not (place / job.marker).is_file():
            continue
        json.loads((place / job.marker).read_text())
        for path in sorted(place.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key).contiguous()
                    data = tensor.view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)
                    found[f"{name}/{path.name}/{key}"] = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    return found


# ---------------------------------------------------------------- processes
@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "os.truncate")


def _watch(folder: Path, stop_at: int | None, counter: Path | None) -> None:
    """In the child: count file operations below `folder`; die just before number `stop_at`."""
    count, inside = 0, str(folder)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in EVENTS or not arguments or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if not os.path.abspath(arguments[0]).startswith(inside):
            return
        count += 1
        if counter is not None:
            os.write(fd, b".")
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    fd = None if counter is None else os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)


def _forked(work: Callable[[], int], before: Callable[[], None] | None = None, kill_after: float | None = None) -> int:
    """Run in a forked process with its output thrown away; returns its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            silence = os.open(os.environ.get("HOSTILE_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            torch.manual_seed(0)
            if before is not None:
                before()
            code = work()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody kills: its result, its duration, its number of file operations."""

    result: dict[str, str]
    seconds: float
    operations: int


def undisturbed(job: Job, folder: Path) -> Undisturbed:
    """Prepare `folder / "template"` and run the job once on a copy of it."""
    template, place = folder / "template", folder / "undisturbed"
    template.mkdir(parents=True)
    if _forked(lambda: job.prepare(template) or 0):
        raise RuntimeError("The job could not be prepared; set HOSTILE_LOG to a file to see why.")
    shutil.copytree(template, place)
    start = time.monotonic()
    with _inside(place):
        code = _forked(lambda: job.run(place), lambda: _watch(place, None, folder / "operations"))
    if code:
        raise RuntimeError(f"The undisturbed run ended with {code}; set HOSTILE_LOG to a file to see why.")
    return Undisturbed(result(place, job), time.monotonic() - start, (folder / "operations").stat().st_size)


@dataclass(frozen=True)
class Trial:
    """One job killed again and again, then left to finish.

    Args:
        kills: times it was killed.
        equal: whether the result is that of the undisturbed run, tensor by tensor.
        partial: outputs that looked finished after a kill but were not those of the undisturbed run.
        left: hidden folders that kills left behind and that were still there in the end.
        why: what went wrong.
    """

    kills: int
    equal: bool
    partial: int
    left: int
    why: str = ""


def trial(job: Job, calm: Undisturbed, seed: int, folder: Path, kills: int = 2) -> Trial:
    """Kill up to `kills` runs in a row at points drawn from `seed`, then let the job finish."""
    draw, place = random.Random(seed), folder / f"trial-{seed}"
    shutil.copytree(folder / "template", place)
    killed = partial = 0
    try:
        with _inside(place):
            for _ in range(kills):
                if draw.random() < 0.5:
                    code = _forked(lambda: job.run(place), kill_after=draw.random() * calm.seconds)
                else:
                    stop = draw.randint(1, max(calm.operations, 1))
                    code = _forked(lambda: job.run(place), lambda at=stop: _watch(place, at, None))
                if code == -signal.SIGKILL:
                    killed += 1
                elif code:
                    return Trial(killed, False, partial, 0, f"a run after {killed} kills ended with {code}")
                partial += _is_partial(place, job, calm)
            code = _forked(lambda: job.run(place))
        if code:
            return Trial(killed, False, partial, 0, f"the last run ended with {code}")
        equal = result(place, job) == calm.result
        left = sum(path.name.startswith(".") and path.is_dir() for path in place.iterdir())
        return Trial(killed, equal, partial, left, "" if equal else "another result")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _is_partial(place: Path, job: Job, calm: Undisturbed) -> bool:
    try:
        found = result(place, job)
    except Exception:  # whatever cannot be read is not whole
        return True
    return bool(found) and found != calm.result


def main(names: str, first_seed: str, trials: str, kills: str) -> int:
    """Run trials of some jobs (names with commas) and print them."""
    from transformers import AutoModelForCausalLM  # noqa: F401

    import trl_mlc.cli
    import trl_mlc.dpo  # noqa: F401

    torch.set_num_threads(1)
    for name in names.split(","):
        with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
            calm = undisturbed(JOBS[name], Path(folder))
            if not calm.result:
                raise RuntimeError("The undisturbed run has no result.")
            for seed in range(int(first_seed), int(first_seed) + int(trials)):
                found = trial(JOBS[name], calm, seed, Path(folder), int(kills))
                sys.stdout.write(json.dumps({"job": name, "seed": seed, **asdict(found)}) + "\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
