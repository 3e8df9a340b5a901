"""Times on a GPU that mean something for decoding: CUDA graphs of many calls over weights that no cache holds."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

import torch


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
        for call in calls:
            call()
        stream.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        once = max(start.elapsed_time(end) * 1e-3, 1e-5)
    repeats = max(1, min(50, round(at_least / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    found = []
    graph.replay()
    for _ in range(rounds):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    return statistics.median(found), (max(found) - min(found)) / 2


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
