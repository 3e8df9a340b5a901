"""Kernels and whole linears on one GPU, all providers in one run: times per shape and number of tokens.

    python -m benchmarks.speed.linear --out DIR [--seconds 100]

A whole linear is everything between a bfloat16 input and output: centring, branch, rotation, rounding, product, scales,
biases. Times are CUDA graphs of calls that go through more weights than the cache holds. Rows go to `linear.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.speed.layers import Shape
from benchmarks.speed.roof import bandwidths
from benchmarks.speed.timing import cold_bytes, graph_microseconds
from optimum_freeact.kernels import ops


SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096))
TOKENS = (1, 4, 16, 64, 2048, 8192)


def tier_parts(tier: str) -> dict[tuple[str, str], tuple]:
    """A preset's whole linear, and its two parts."""
    return {
        ("linear", tier): ("whole", tier),
        ("kernel", f"{tier} product"): ("part_product", tier),
        ("kernel", f"{tier} round"): ("part_round", tier),
    }


# in the order of measuring: what the claims need, the other tiers, peers; a method of `Shape` and its arguments
MEASURED: tuple[dict[tuple[str, str], tuple], ...] = (
    {("linear", "bf16"): ("whole_bf16",), **tier_parts("freeact-fastest")},
    tier_parts("freeact-fast"),
    tier_parts("freeact"),
    {
        ("kernel", "bare product"): ("part_bare_product",),
        ("kernel", "float8 product"): ("part_float8",),
        ("kernel", "copy of the rows"): ("part_copy",),
        ("linear", "int4 weight-only"): ("whole_int4_weight_only",),
        ("linear", "fake quantization"): ("whole_fake",),
    },
    {("linear", "int8 dynamic"): ("whole_int8_dynamic",)},
)


def wanted(provider: str, n: int) -> bool:
    """Whether a provider has such a number of tokens: libraries' 8-bit products need more than 16."""
    if provider in ("float8 product", "int8 dynamic", "fake quantization", "copy of the rows"):
        return n >= 2048
    return not (provider == "int4 weight-only" and n > 64)


@torch.no_grad()
def main() -> None:
    """Measure everything that fits into the time, claims first."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--only", nargs="+", help="measure these providers only")
    parser.add_argument("--suffix", default="", help="added to providers' names, for runs with other settings")
    parser.add_argument(
        "--cache", type=int, help="bytes of weights between two uses of one; default: what no cache holds"
    )
    args = parser.parse_args()
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "linear.jsonl", "a", encoding="utf-8") as file:

        def row(**fields) -> None:
            text = json.dumps(fields)
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()

        for provider, value in bandwidths("cuda").items():
            row(what="roof", provider=provider, metric="bytes_per_second", value=value)
        shapes = {size: Shape(*size, "cuda", args.cache or cold_bytes()) for size in SHAPES}
        for providers in MEASURED:
            for (d, m), shape in shapes.items():
                for n in TOKENS:
                    for (what, provider), (method, *more) in providers.items():
                        if not wanted(provider, n) or time.monotonic() - begin > args.seconds:
                            continue
                        if args.only and provider not in args.only:
                            continue
                        labels = {
                            "what": what,
                            "provider": provider + args.suffix,
                            "n": n,
                            "k": d,
                            "m": m,
                            "metric": "microseconds",
                        }
                        try:
                            value, spread = graph_microseconds(getattr(shape, method)(n, *more))
                        except Exception as error:
                            row(**labels, value=None, note=f"{type(error).__name__}: {error}"[:200])
                        else:
                            row(**labels, value=value, spread=spread)
        for name, reason in ops.failures().items():
            row(what="failure", provider=name, metric="failed", value=1.0, note=reason)
        row(what="time", provider="all", metric="seconds", value=time.monotonic() - begin)


if __name__ == "__main__":
    main()
