"""The token types benchmark's jobs: their order, their memory, and what a result tells of them."""

import time

import torch

from benchmarks.token_types import cost_claims, run, runner
from benchmarks.token_types.plan import plan, timing
from benchmarks.token_types.table import assemble
from tools.result_files import problems, read


class FakeWorker:
    """Answers at once, and notes which jobs ran beside each."""

    running: dict = {}
    log: list = []

    def __init__(self, gpu, threads, log):  # noqa: ARG002
        self.gpu = gpu

    def start(self):
        pass

    stop = start

    def ask(self, job, seconds):  # noqa: ARG002
        beside = self.running.setdefault(self.gpu, [])
        self.log.append((self.gpu, job, list(beside)))
        beside.append(job)
        time.sleep(0.02)
        beside.remove(job)
        return {"error": "broken"} if job.model == "vlm" and job.group == "train" else {"rows": []}


def test_jobs_wait_for_their_model_and_the_timing_is_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    monkeypatch.setattr(runner, "gpus", lambda _: ["0", "1"])
    monkeypatch.setattr(FakeWorker, "log", [])
    options = run.parser().parse_args(["--device", "cuda", "--work", str(tmp_path), "--no-ablations"])
    options.rows = tmp_path / "rows.jsonl"
    training, jobs = plan(options, {})
    timed = timing(options)
    done = runner.Runner(options, "0" * 40)
    done.run([*training, *timed, *jobs], 6)
    started = [job for _, job, _ in FakeWorker.log]
    assert {job.key for job in started} == {job.key for job in [*training, *timed, *jobs] if job.model != "vlm"} | {
        job.key for job in training
    }
    for gpu, job, beside in FakeWorker.log:
        if job.group == "time":
            assert (gpu, beside) == ("0", [])
            assert job is started[-1]
        assert job.group in ("train", "warm") or not any(other.group == "train" for other in beside)
    assert [job.model for job in started if job.group == "train"] == ["diffusion", "vlm", "three_types"]
    trained = [gpu for gpu, job, _ in FakeWorker.log if job.group == "train"]
    assert trained == ["0", "1", "0"]
    missing = assemble([job for job in jobs if job.model == "vlm"], done)
    assert {row["note"] for row in missing} == {"not run"}
    assert "broken" in capsys.readouterr().out


class FullWorker(FakeWorker):
    """Has memory for two jobs at a time."""

    def ask(self, job, seconds):  # noqa: ARG002
        beside = self.running.setdefault(self.gpu, [])
        self.log.append((self.gpu, job, list(beside)))
        beside.append(job)
        time.sleep(0.02)
        full = len(beside) > 2
        beside.remove(job)
        return {"error": "OutOfMemoryError: CUDA out of memory. Process 7"} if full else {"rows": []}


def test_a_job_that_finds_no_memory_comes_again_among_fewer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "Worker", FullWorker)
    monkeypatch.setattr(runner, "gpus", lambda _: ["0"])
    monkeypatch.setattr(FullWorker, "log", [])
    monkeypatch.setattr(runner, "TRIES", 100)
    options = run.parser().parse_args(["--device", "cuda", "--work", str(tmp_path), "--models", "vlm", "--no-timing"])
    options.rows = tmp_path / "rows.jsonl"
    training, jobs = plan(options, {})
    kept = []
    done = runner.Runner(options, "0" * 40, lambda: kept.append(1))
    done.run([*training, *jobs], 6)
    assert set(done.told) == {job.key for job in [*training, *jobs]}
    assert len(kept) == len(done.told)
    assert done.failures == {}
    assert "no memory for vlm" in capsys.readouterr().out
    again = [len(beside) for _, _, beside in FullWorker.log[-10:]]
    assert max(again) <= 1


def test_a_job_that_never_finds_memory_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    monkeypatch.setattr(runner, "gpus", lambda _: ["0"])
    answer = {"error": "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"}
    asked = []
    monkeypatch.setattr(FakeWorker, "ask", lambda _, job, __: asked.append(job) or answer)
    options = run.parser().parse_args(["--device", "cuda", "--work", str(tmp_path), "--models", "vlm", "--no-timing"])
    options.rows = tmp_path / "rows.jsonl"
    training, jobs = plan(options, {})
    done = runner.Runner(options, "0" * 40)
    done.run([*training, *jobs], 3)
    assert asked == training * runner.TRIES
    assert list(done.failures) == [training[0].key]


def test_the_cost_of_types_is_measured_alone(tmp_path):
    from benchmarks.token_types import cost

    small = ["--shapes", "135m", "--tokens", "3", "--repeats", "2", "--copies", "2", "--threads", "1"]
    assert cost.main(["--device", "cpu", *small, "--out", str(tmp_path)]) == 0
    document = read(tmp_path / "token_types_cost_cpu.json")
    assert problems(document) == []
    assert document["claims"] == []  # the claim is about a GPU
    assert [entry["id"] for entry in cost_claims.claims(document["rows"])] == ["token_types.three_types_time_ratio"]
    same = [row["value"] for row in document["rows"] if row["metric"] == "mixed_batch_differences_same"]
    assert same == [0, 0, 0]  # of each tier


def test_windows_to_choose_by_are_not_those_that_are_shown():
    from benchmarks.token_types.diffusion import windows_beside, windows_of

    stream = torch.arange(44 * 8)
    shown, others = (f(stream, 24, 8)[:, 0].tolist() for f in (windows_of, windows_beside))
    assert len(set(shown)) == 24
    assert len(set(others)) == 20
    assert not set(shown) & set(others)


def test_lanes_may_differ_by_gpu():
    assert runner.spread(["a", "b"], 3) == ["a", "b", "a"]
    assert runner.spread(["a", "b"], [3, 1]) == ["a", "b", "a", "a"]
    assert runner.spread(["a"], [2, 9]) == ["a", "a"]
    assert run.slots("9,4", 2) == [9, 4]
    assert (run.slots(None, 2), run.slots("0", 2)) == (2, 0)


def test_a_result_tells_how_it_was_made_but_not_where(monkeypatch):
    monkeypatch.setattr(
        run.result_files, "command_line", lambda: "python run.py --jobs 4 --work /tmp/x --seeds 0 --out out"
    )
    assert run.command() == "python run.py --jobs 4 --seeds 0"
