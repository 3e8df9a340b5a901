"""Jobs in lanes: some at a time, each lane with a GPU of its own (round robin)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable


def gpus(device: str) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may be for one process each; `[""]` on a CPU and where there is no GPU."""
    if device == "cpu":
        return [""]
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]) or [""]


def run_in_lanes(
    jobs: Iterable,
    lanes: int,
    devices: list[str],
    work: Callable[[object, str], None],
    may_start: Callable[[object], bool] | None = None,
) -> None:
    """Call `work(job, gpu)` for every job, `lanes` at a time in threads; returns when all are done.

    Args:
        jobs: In the order in which they are started.
        lanes (`int`): How many at a time, at least 1.
        devices (`list[str]`): See [`gpus`]; lane i uses entry i modulo their number.
        work: Must not raise; a lane that raises takes no further job.
        may_start (*optional*): Asked before each start, never by two lanes at once: a lane takes the first job that it
            allows, and the first of all where it allows none.
    """
    waiting, lock = list(jobs), threading.Lock()

    def take() -> list:
        with lock:
            for i, job in enumerate(waiting if may_start else ()):
                if may_start(job):
                    return [waiting.pop(i)]
            return [waiting.pop(0)] if waiting else []

    def lane(gpu: str) -> None:
        while taken := take():
            work(taken[0], gpu)

    threads = [threading.Thread(target=lane, args=(devices[i % len(devices)],)) for i in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
