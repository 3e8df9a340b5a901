"""Runs jobs in processes of their own, several at a time, and keeps what they found."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks._lanes import gpus, run_in_lanes
from benchmarks.accuracy.jobs import Job
from benchmarks.accuracy.perform import MEMORY_SHARE, perform
from tools import result_files


def without_folders(text: str) -> str:
    """A text in which every path is its last part: nothing of this machine belongs in a result."""
    return re.sub(r"(?<![\w.])(?:/[\w.+@~-]+)+/(?=[\w.+@~-])", "", text)


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
            self.failures[job.key] = error = without_folders(" ".join(told["error"].split()))[:400]
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
        command = [sys.executable, "-m", "benchmarks.accuracy.perform"]
        with self._log.open("wb") as sink:
            self._process = subprocess.Popen(
                command, cwd=result_files.ROOT, env=environment, stdin=subprocess.PIPE, stdout=sink, stderr=sink
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
