"""Runs jobs on all GPUs at once and keeps what they told."""

from __future__ import annotations

import argparse
import json
import os
import re
import threading
import time
from collections.abc import Callable

from benchmarks._lanes import gpus
from benchmarks.token_types.claims import LOSS
from benchmarks.token_types.jobs import Job, perform
from benchmarks.token_types.worker import Worker


TIMING_SECONDS = 45.0  # kept free at the end for the timing, whose kernels were compiled before
TRIES = 4  # of a job that finds no memory
# what a GPU that is full says, through whichever library asks first
FULL = ("out of memory", "OutOfMemory", "CUDNN_STATUS", "CUBLAS_STATUS", "CUSOLVER_STATUS")
TIMED = ("warm", "time")
FREE = ("train", "warm", "time")  # groups of jobs that need no trained model


class Runner:
    """Jobs in the order they are given, as soon as the model they need is trained.

    Each GPU has some workers. Model i is trained on GPU i (round robin), and meanwhile nothing else runs there. The timing
    has the first GPU to itself, at the end: when all else is done, or when just the time for it is left.

    A job that finds no memory comes again as soon as it is alone among fewer: the GPU then takes one job less at a time.

    Args:
        options: Of the command line.
        stamp: The commit; rows of another one do not count.
        kept: Called whenever a job's rows were kept.
    """

    def __init__(self, options: argparse.Namespace, stamp: str, kept: Callable[[], None] = lambda: None):
        self.options, self.stamp, self.start, self.kept = options, stamp, time.perf_counter(), kept
        self.told: dict[str, list[dict]] = {}
        self.failures: dict[str, str] = {}
        self._change = threading.Condition()
        self._waiting: list[Job] = []
        self._running: dict[str, list[Job]] = {}
        self._devices: list[str] = []
        self._homes: dict[str, str] = {}
        self._most: dict[str, int] = {}  # jobs at a time, by GPU, once one found no memory
        self._tried: dict[str, int] = {}
        if options.rows.is_file():
            for line in options.rows.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if entry["commit"] == stamp:
                    self.told[entry["key"]] = entry["rows"]

    def run(self, jobs: list[Job], slots: int | list[int]) -> None:
        """Run what was not run yet, `slots` at a time (or as many on each GPU; 0: all in this process); returns when
        nothing runs any more.
        """
        self._waiting = [job for job in jobs if job.key not in self.told]
        self._trained = {job.model for job in jobs if job.group == "train" and job.key in self.told}
        if slots == 0:
            for job in list(self._waiting):
                if job.group in FREE or job.model in self._trained:
                    self._keep(job, self._here(job), time.perf_counter())
            return
        self._devices = gpus(self.options.device)
        self._running = {gpu: [] for gpu in self._devices}
        models = dict.fromkeys(job.model for job in jobs if job.group == "train")
        self._homes = {model: self._devices[i % len(self._devices)] for i, model in enumerate(models)}
        lanes = spread(self._devices, slots)
        threads = [threading.Thread(target=self._lane, args=(i, gpu, False)) for i, gpu in enumerate(lanes)]
        if any(job.group in TIMED for job in self._waiting):  # a worker of its own, which compiled the kernels itself
            threads.append(threading.Thread(target=self._lane, args=(len(lanes), self._devices[0], True)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def left(self, gpu: str, job: Job | None = None) -> float | None:
        """Seconds that a job on a GPU may still take."""
        if self.options.stop_seconds is None:
            return None
        kept = TIMING_SECONDS if self._timed_on(gpu) and not (job and job.group == "time") else 0.0
        return self.options.stop_seconds - kept - (time.perf_counter() - self.start)

    def _timed_on(self, gpu: str) -> bool:
        """Whether the timing still needs this GPU."""
        return gpu == self._devices[0] and any(job.group == "time" for job in self._waiting)

    def _lane(self, index: int, gpu: str, times: bool) -> None:
        worker = Worker(gpu, self.options.threads, self.options.work / "logs" / f"worker_{index}.log")
        worker.start()
        while (job := self._next(gpu, times)) is not None:
            begun = time.perf_counter()
            told = worker.ask(job, self.left(gpu, job))
            if "CUDA error" in told.get("error", ""):  # nothing works in that process any more
                worker.stop()
            with self._change:
                beside = len(self._running[gpu])
                self._running[gpu].remove(job)
                if not self._comes_again(job, gpu, told, beside):
                    self._keep(job, told, begun)
                self._change.notify_all()
        worker.stop()

    def _comes_again(self, job: Job, gpu: str, told: dict, beside: int) -> bool:
        """Whether a job that found no memory waits again, for a GPU that takes fewer at a time from now on."""
        if not any(word in told.get("error", "") for word in FULL) or job.group in TIMED:
            return False
        self._tried[job.key] = self._tried.get(job.key, 0) + 1
        if self._tried[job.key] >= TRIES:
            return False
        self._most[gpu] = max(1, min(self._most.get(gpu, beside), beside - 1))
        self._waiting.insert(0, job)
        now = time.perf_counter() - self.start
        print(f"{now:6.1f}  no memory for {job.name}: again, {self._most[gpu]} at a time on GPU {gpu}", flush=True)
        return True

    def _next(self, gpu: str, times: bool) -> Job | None:
        """The first job that may start on a GPU; waits for one; `None` when there will be none."""
        with self._change:
            while True:
                left = self.left(gpu)
                over = left is not None and left < 5 and not self._timed_on(gpu)
                mine = [job for job in self._waiting if (job.group in TIMED) == times]
                chosen = None if over else next((job for job in mine if self._may(job, gpu)), None)
                if chosen is not None:
                    self._waiting.remove(chosen)
                    self._running[gpu].append(chosen)
                    return chosen
                if over or not mine or self._stuck():
                    return None
                self._change.wait(1.0)

    def _stuck(self) -> bool:
        """Whether nothing runs and nothing that waits can start anywhere."""
        busy = any(self._running.values())
        return not busy and not any(self._may(job, gpu) for job in self._waiting for gpu in self._devices)

    def _may(self, job: Job, gpu: str) -> bool:
        """Whether a job may start on a GPU now."""
        here = self._running[gpu]
        if any(other.group == "time" for other in here):
            return False
        left = self.left(gpu)
        if job.group == "time":
            others = [other for other in self._waiting if other.group != "time"]
            due = not (others or any(self._running.values())) or (left is not None and left < 5)
            return gpu == self._devices[0] and not here and due
        if left is not None and left < 5:
            return False
        if job.group == "warm":
            return gpu == self._devices[0]
        if len(here) >= self._most.get(gpu, len(here) + 1):
            return False
        if job.group == "train":
            return self._homes[job.model] == gpu
        training = any(other.group == "train" for other in here)
        return job.model in self._trained and not training and not self._training_waits(gpu)

    def _training_waits(self, gpu: str) -> bool:
        return any(job.group == "train" and self._homes[job.model] == gpu for job in self._waiting)

    def _here(self, job: Job) -> dict:
        try:
            return {"rows": perform(job)}
        except Exception as error:  # as in the worker
            if os.environ.get("CONCORD_RAISE"):
                raise
            return {"error": f"{type(error).__name__}: {error}"}

    def _keep(self, job: Job, told: dict, begun: float) -> None:
        seconds, now = time.perf_counter() - begun, time.perf_counter() - self.start
        if "error" in told:
            message = re.sub(r" ?\(/[^)]*\)?", "", told["error"]).partition(
                "out of memory."
            )  # no paths, no process ids
            self.failures[job.key] = " ".join("".join(message[:2]).split())[:400]
            print(f"{now:6.1f} {seconds:6.1f} s  {job.name}: {self.failures[job.key][:300]}", flush=True)
            if job.group == "train":  # nothing can follow
                self._waiting = [other for other in self._waiting if other.model != job.model]
            return
        if job.group == "warm":
            print(f"{now:6.1f} {seconds:6.1f} s  kernels compiled", flush=True)
            return
        self.told[job.key] = told["rows"]
        if job.group == "train":
            self._trained.add(job.model)
        shown = [f"{r['value']:.3f}" for r in told["rows"] if r["metric"] in (LOSS.get(job.model), "training_loss")]
        print(f"{now:6.1f} {seconds:6.1f} s  {job.name}: {' '.join(shown) or 'done'}", flush=True)
        self.options.rows.parent.mkdir(parents=True, exist_ok=True)
        with self.options.rows.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": job.key, "commit": self.stamp, "rows": told["rows"]}) + "\n")
        self.kept()


def spread(devices: list[str], slots: int | list[int]) -> list[str]:
    """The GPU of each lane: a number of lanes for all GPUs in turn, or one for each (the last for all further ones)."""
    if isinstance(slots, int):
        return [devices[i % len(devices)] for i in range(max(slots, len(devices)))]
    each = [slots[min(i, len(slots) - 1)] for i in range(len(devices))]
    return [device for i in range(max(each)) for device, n in zip(devices, each, strict=True) if i < max(1, n)]
