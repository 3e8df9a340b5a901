"""Decode attention over a 4-bit KV cache, and writing to it: our kernels, SDPA on bfloat16, and unpacking before SDPA.

    python -m benchmarks.speed.kv [--rows FILE] [--contexts 8192 32768] [--batches 1 8]
    python -m benchmarks.speed.kv --tune [--rows FILE]

One step of one layer with the heads of an 8B Llama (32 of queries, 8 of keys, 128 channels), in CUDA graphs over as many
layers as no cache of the GPU holds. `freeact` is the default, rows rotated about their means, everything that a step takes (the
query's rotation, the output's back) included. `unpack, sdpa` is what the cache did without a kernel: all states are decoded, then read.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import torch

from benchmarks.speed.timing import copies_for, graph_microseconds
from optimum_freeact.kernels import kv_attend_triton, kv_reference, kv_write_triton
from optimum_freeact.kernels.kv_reference import CacheRows
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.vector_codec import encode
from tools.result_files import RESULTS, command_line, without_places, write


HEADS, KEY_HEADS, SIZE = 32, 8, 128


STORED = {"freeact": (True, True), "freeact, not rotated": (True, False), "freeact, no means": (False, False)}


def cached(batch: int, tokens: int, device: str, means: bool, rotate: bool) -> tuple[CacheRows, CacheRows]:
    """Random keys (with means that turn) and values."""
    found = []
    rotation = flat_rotation(SIZE, torch.Generator().manual_seed(0)).to(device, torch.float32) if rotate else None
    for turns in (True, False):
        parts = [torch.randn(KEY_HEADS, 1, SIZE, device=device) for _ in range(batch)]
        data = torch.stack(
            [encode(p + torch.randn(KEY_HEADS, tokens, SIZE, device=device), 4, torch.bfloat16) for p in parts]
        )
        rows = CacheRows(data, torch.bfloat16, rotation=rotation)
        if means:
            rows.mean = torch.randn(KEY_HEADS, SIZE, device=device)
            rows.exact = torch.randn(batch, KEY_HEADS, 1, SIZE, device=device, dtype=torch.bfloat16)
            if turns:
                n = SIZE // 2
                angles = torch.arange(tokens, device=device).double()[:, None] * 5e5 ** -(
                    torch.arange(n, device=device).double() / n
                )
                rows.cos, rows.sin = angles.cos().float(), angles.sin().float()
        found.append(rows)
    return tuple(found)


def unpacked(query, keys, values, start, scale):
    """All states decoded to the query's type, then SDPA."""
    k, v = (kv_reference.states(rows, start, SIZE, torch.float32).to(query.dtype) for rows in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=scale)


@torch.no_grad()
def measure(batch: int, tokens: int, device: str) -> list[dict]:
    """Rows of one context."""
    rows, groups = [], HEADS // KEY_HEADS
    labels = {"batch": batch, "tokens": tokens, "metric": "microseconds"}
    start = torch.zeros(batch, dtype=torch.int32, device=device)
    scale = SIZE**-0.5

    def record(what: str, provider: str, calls: list) -> None:
        value, spread = graph_microseconds(calls)
        rows.append({**labels, "what": what, "provider": provider, "value": value, "spread": spread})

    def queries(n: int) -> list[torch.Tensor]:
        return [torch.randn(batch, KEY_HEADS, groups, SIZE, device=device, dtype=torch.bfloat16) for _ in range(n)]

    n_bytes = 2 * 2 * batch * KEY_HEADS * tokens * SIZE
    plain = [
        tuple(torch.randn(batch, KEY_HEADS, tokens, SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(copies_for(n_bytes))
    ]
    pairs = list(zip(queries(len(plain)), plain))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    record("attention", "sdpa, bfloat16", [lambda q=q, k=k, v=v: sdpa(q, k, v, scale=scale) for q, (k, v) in pairs])
    record("attention", "sdpa, bfloat16, query heads", [
        lambda q=q, k=k, v=v: sdpa(q.view(batch, HEADS, 1, SIZE), k, v, scale=scale, enable_gqa=True)
        for q, (k, v) in pairs
    ])  # fmt: skip
    del plain, pairs
    for name, (means, rotate) in STORED.items():
        packed = [cached(batch, tokens, device, means, rotate) for _ in range(copies_for(n_bytes * 68 // 256))]
        pairs = list(zip(queries(len(packed)), packed))
        record("attention", name, [
            lambda q=q, k=k, v=v: kv_attend_triton.attend(q, k, v, start, scale) for q, (k, v) in pairs
        ])  # fmt: skip
        if rotate:
            q, (k, v) = pairs[0]
            want = kv_reference.attend(q.double(), k, v, start, scale, dtype=torch.float64) if tokens <= 8192 else None
            for provider, got in (
                ("freeact", kv_attend_triton.attend(q, k, v, start, scale)),
                ("unpack, sdpa", unpacked(q, k, v, start, scale)),
            ):
                if want is not None:
                    error = float((got.double() - want).norm() / want.norm())
                    rows.append(
                        {
                            **labels,
                            "metric": "relative_error",
                            "what": "attention",
                            "provider": provider,
                            "value": error,
                        }
                    )
            record(
                "attention",
                "unpack, sdpa",
                [lambda q=q, k=k, v=v: unpacked(q, k, v, start, scale) for q, (k, v) in pairs[:2]],
            )
        del packed, pairs
    keys, _ = cached(batch, 256, device, True, True)
    new = torch.randn(batch, KEY_HEADS, 1, SIZE, device=device, dtype=torch.bfloat16)
    out = torch.empty(batch, KEY_HEADS, 1, 68, dtype=torch.uint8, device=device)
    assert keys.mean is not None
    assert keys.rotation is not None
    means, rotation = keys.mean[None, :, None], keys.rotation
    record("write", "freeact", [lambda: kv_write_triton.write_rows(new, keys, start, 200, out)] * 8)
    record("write", "torch", [lambda: out.copy_(encode((new.float() - means) @ rotation, 4, torch.bfloat16))] * 8)
    plain = dataclasses.replace(keys, rotation=None)
    record("write", "freeact, not rotated", [lambda: kv_write_triton.write_rows(new, plain, start, 200, out)] * 8)
    if batch > 1:
        return rows
    prompt = torch.randn(1, KEY_HEADS, 2048, SIZE, device=device, dtype=torch.bfloat16)
    room = torch.empty(1, KEY_HEADS, 2048, 68, dtype=torch.uint8, device=device)
    keys, _ = cached(1, 4096, device, True, True)
    for provider, there in (("freeact", keys), ("freeact, not rotated", dataclasses.replace(keys, rotation=None))):
        record(
            "write 2048",
            provider,
            [lambda there=there: kv_write_triton.write_rows(prompt, there, start[:1], 0, room)] * 8,
        )
    return rows


@torch.no_grad()
def tune(batch: int, tokens: int, device: str) -> list[dict]:
    """Our attention with other launch settings."""
    rows, start = [], torch.zeros(batch, dtype=torch.int32, device=device)
    for means, rotate in STORED.values():
        packed = [
            cached(batch, tokens, device, means, rotate)
            for _ in range(copies_for(batch * KEY_HEADS * tokens * 2 * 68, most=12))
        ]
        query = torch.randn(batch, KEY_HEADS, HEADS // KEY_HEADS, SIZE, device=device, dtype=torch.bfloat16)
        for block, programs, warps, stages in itertools.product((64, 128), (264, 528), (4, 8), (2, 3)):
            launch = {"block": block, "programs": programs, "warps": warps, "stages": stages}
            try:
                value, spread = graph_microseconds([
                    lambda k=k, v=v, q=query, launch=launch: kv_attend_triton.attend(q, k, v, start, SIZE**-0.5, launch=launch)
                    for k, v in packed
                ], rounds=3)  # fmt: skip
            except Exception as error:  # a setting that does not fit is a result
                print(json.dumps({**launch, "error": str(error)[:80]}), flush=True)
                continue
            rows.append({"batch": batch, "tokens": tokens, "metric": "microseconds", "what": "tuning", "means": means,
                         "rotated": rotate, **launch, "value": value, "spread": spread})  # fmt: skip
    return rows


def main() -> None:
    """Measure, append bare rows, and write `benchmarks/results/speed_kv.json` (or where `--out` says)."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=Path("kv_rows.jsonl"), help="rows are appended here as they come")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tune", action="store_true", help="other launch settings instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    for batch in args.batches:
        for tokens in args.contexts:
            with args.rows.open("a", encoding="utf-8") as file:
                for row in (tune if args.tune else measure)(batch, tokens, "cuda"):
                    print(json.dumps(row), flush=True)
                    file.write(json.dumps(row) + "\n")
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    print(
        write(
            "speed_kv",
            rows,
            "benchmarks.speed.no_claims",
            without_places(command_line()),
            [0],
            folder=args.out or RESULTS,
        )
    )


if __name__ == "__main__":
    main()
