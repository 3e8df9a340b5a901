"""Times on a GPU that mean something for decoding: CUDA graphs of many calls over weights that no cache holds."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The GPU to oneself among all programs that name the same file in `SPEED_LOCK`: they compile side by side, on CPU cores, and
    time one after the other. Nothing without that variable.
    """
    path = os.environ.get("SPEED_LOCK")
    if not path:
        yield
        return
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def graph_microseconds(
    calls: Sequence[Callable[[], object]], *, rounds: int = 7, at_least: float = 2e-3
) -> tuple[float, float]:
    """Median and spread (half the range) in microseconds of one call, from replays of a graph of all calls in turn.

    Args:
        calls: The same work on different tensors, enough of them to exceed the last-level cache where it matters.
        rounds (`int`, *optional*, defaults to 7): Replays that are timed.
        at_least (`float`, *optional*, defaults to 2 ms): Each replay repeats the calls until it takes about as long.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
        stream.synchronize()
    with quiet():
        return _timed(calls, rounds, at_least)


def _timed(calls: Sequence, rounds: int, at_least: float) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(graph: torch.cuda.CUDAGraph) -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    graph = _captured(calls, 1)
    graph.replay()
    once = seconds(
        graph
    )  # a replay: the calls one by one may take a host's time, and a graph of few is mostly its beginning
    repeats = max(1, min(50, round(at_least / max(once, 1e-6))))
    if repeats > 1:
        graph = _captured(calls, repeats)
        graph.replay()
    found = [seconds(graph) * 1e6 / (repeats * len(calls)) for _ in range(rounds)]
    return statistics.median(found), (max(found) - min(found)) / 2


def _captured(calls: Sequence, repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph


def cold_bytes() -> int:
    """Bytes of weights to go through so that a use finds nothing of the one before in the GPU's second-level cache: five times
    that cache, whatever it throws out first.
    """
    return max(250_000_000, 5 * torch.cuda.get_device_properties(0).L2_cache_size)


def copies_for(n_bytes: int, cache: int = 300_000_000, most: int = 48) -> int:
    """How many different buffers of `n_bytes` to go through so that none is found in a cache."""
    return max(1, min(most, -(-cache // max(n_bytes, 1))))


def kept(method):
    """A method's results kept in its object, by arguments, so that they go when it goes."""

    @functools.wraps(method)
    def once(self, *args):
        store = self.__dict__.setdefault("_kept", {})
        if (method.__name__, args) not in store:
            store[method.__name__, args] = method(self, *args)
        return store[method.__name__, args]

    return once
