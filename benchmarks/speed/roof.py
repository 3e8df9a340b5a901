"""How fast this GPU's memory is, and whether the benchmark's weights come from there and not from a cache.

    python -m benchmarks.speed.roof --out DIR

The roof is a kernel that only reads, over a gigabyte: a decoding step reads its weights and writes next to nothing, and a copy,
which reads as much as it writes, moves fewer bytes a second. Then one weight at a time, for ever more different weights in turn:
one, which the second-level cache may hold, up to more than twenty times that cache. What is as fast with few as
with many owes the cache nothing. Rows go to `linear.jsonl`, beside those of `linear.py`, which measures the roof for itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks.speed.claims import OURS
from benchmarks.speed.layers import Shape
from benchmarks.speed.timing import copies_for, graph_microseconds


BLOCK = 4096  # floats that a program reads; larger ones, and several a program, were no faster
CYCLED = (1, 60_000_000, 250_000_000, 1_200_000_000)  # bytes to go through between two uses of a weight


@triton.jit
def _read(x, found, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(found + pid, tl.sum(tl.load(x + pid * BLOCK + tl.arange(0, BLOCK))))


def read(x: torch.Tensor, found: torch.Tensor) -> None:
    """Reads all of a float32 vector, and writes the sums of its pieces of `BLOCK` numbers to `found`."""
    _read[(len(found),)](x, found, BLOCK=BLOCK, num_warps=8)


def reads(n_bytes: int, cycled: int, device: str) -> list[Callable[[], None]]:
    """Calls that read so many bytes each, of as many vectors as make `cycled` bytes."""
    pieces = n_bytes // (4 * BLOCK)
    found = torch.empty(pieces, device=device)
    vectors = [torch.ones(pieces * BLOCK, device=device) for _ in range(copies_for(n_bytes, cycled))]
    return [lambda x=x: read(x, found) for x in vectors]


def bandwidths(device: str, n_bytes: int = 1 << 30) -> dict[str, float]:
    """Bytes a second of a kernel that reads, and of a copy, which reads and writes."""
    read_us, _ = graph_microseconds(reads(n_bytes, 1, device))
    source = torch.ones(n_bytes // 8, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    copy_us, _ = graph_microseconds([lambda: target.copy_(source)])
    return {"read": n_bytes / read_us * 1e6, "copy": 2 * n_bytes / copy_us * 1e6}


def cycled_rows(
    device: str, sizes: tuple[int, ...] = CYCLED, shape: tuple[int, int] = (4096, 14336)
) -> Iterator[dict]:
    """One weight's time, of a plain read of its four bits, bfloat16's linear and ours, for ever more weights in turn."""
    k, m = shape
    for cycled in sizes:
        layers = Shape(k, m, device, cycled)
        calls = {("read only", 1): reads(k * m // 2, cycled, device)}
        for n in (1, 16):
            calls["bf16", n] = layers.whole_bf16(n)
            calls[OURS, n] = layers.whole(n, OURS)
            calls[f"{OURS} product", n] = layers.part_product(n, OURS)
        for (provider, n), each in calls.items():
            value, spread = graph_microseconds(each)
            yield {
                "what": "cycled", "provider": provider, "n": n, "k": k, "m": m, "megabytes": cycled // 10**6,
                "metric": "microseconds", "value": value, "spread": spread,
            }  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Measure, writing rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "linear.jsonl", "a", encoding="utf-8") as file:

        def write(row: dict) -> None:
            text = json.dumps(row)
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()

        for provider, value in bandwidths("cuda").items():
            write({"what": "roof", "provider": provider, "metric": "bytes_per_second", "value": value})
        for row in cycled_rows("cuda"):
            write(row)


if __name__ == "__main__":
    main()
