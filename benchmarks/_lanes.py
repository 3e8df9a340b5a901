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


def run_in_lanes(jobs: Iterable, lanes: int, devices: list[str], work: Callable[[object, str], None]) -> None:
    """Call `work(job, gpu)` for every job, `lanes` at a time in threads; returns when all are done.

    Args:
        jobs: In the order in which they are started.
        lanes (`int`): How many at a time, at least 1.
        devices (`list[str]`): See [`gpus`]; lane i uses entry i modulo their number.
        work: Must not raise; a lane that raises takes no further job.
    """
    queue, lock = iter(jobs), threading.Lock()

    def lane(gpu: str) -> None:
        while True:
            with lock:
                job = next(queue, None)
            if job is None:
                return
            work(job, gpu)

    threads = [threading.Thread(target=lane, args=(devices[i % len(devices)],)) for i in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
