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


class Context:
    """One step of attention and of writing at a batch and a number of tokens; its rows as they come. Each method's tensors go when
    it ends, before the next makes its own.
    """

    def __init__(self, batch: int, tokens: int, device: str):
        self.batch, self.tokens, self.device = batch, tokens, device
        self.start = torch.zeros(batch, dtype=torch.int32, device=device)
        self.scale = SIZE**-0.5
        self.n_bytes = 2 * 2 * batch * KEY_HEADS * tokens * SIZE  # of keys and values in bfloat16
        self.rows: list[dict] = []

    def record(self, what: str, provider: str, calls: list) -> None:
        """The time of one of the calls."""
        value, spread = graph_microseconds(calls)
        self._row("microseconds", what, provider, value, spread=spread)

    def random(self, batch: int, tokens: int) -> torch.Tensor:
        """Keys, values or, where tokens are query heads of one key head, queries."""
        return torch.randn(batch, KEY_HEADS, tokens, SIZE, device=self.device, dtype=torch.bfloat16)

    def queries(self, n: int) -> list[torch.Tensor]:
        """Queries of one token, by key head."""
        return [self.random(self.batch, HEADS // KEY_HEADS) for _ in range(n)]

    def attention_dense(self) -> None:
        """SDPA on keys and values in bfloat16."""
        batch, scale, sdpa = self.batch, self.scale, torch.nn.functional.scaled_dot_product_attention
        plain = [tuple(self.random(batch, self.tokens) for _ in range(2)) for _ in range(copies_for(self.n_bytes))]
        pairs = list(zip(self.queries(len(plain)), plain))
        self.record("attention", "sdpa, bfloat16", [
            lambda q=q, k=k, v=v: sdpa(q, k, v, scale=scale) for q, (k, v) in pairs
        ])  # fmt: skip
        self.record("attention", "sdpa, bfloat16, query heads", [
            lambda q=q, k=k, v=v: sdpa(q.view(batch, HEADS, 1, SIZE), k, v, scale=scale, enable_gqa=True)
            for q, (k, v) in pairs
        ])  # fmt: skip

    def attention_stored(self, name: str, means: bool, rotate: bool) -> None:
        """Our kernel on one way to store rows; on rotated ones, the default, unpacking too, and the errors of both."""
        # a row of 256 bytes is stored in 68
        copies = copies_for(self.n_bytes * 68 // 256)
        packed = [cached(self.batch, self.tokens, self.device, means, rotate) for _ in range(copies)]
        pairs = list(zip(self.queries(len(packed)), packed))
        self.record("attention", name, [
            lambda q=q, k=k, v=v: kv_attend_triton.attend(q, k, v, self.start, self.scale) for q, (k, v) in pairs
        ])  # fmt: skip
        if rotate:
            if self.tokens <= 8192:  # the reference makes all states float64: gigabytes of more
                self.attention_errors(pairs[0])
            self.record("attention", "unpack, sdpa", [
                lambda q=q, k=k, v=v: unpacked(q, k, v, self.start, self.scale) for q, (k, v) in pairs[:2]
            ])  # fmt: skip

    def attention_errors(self, pair: tuple[torch.Tensor, tuple[CacheRows, CacheRows]]) -> None:
        """How far the outputs lie from the reference's in float64, relatively."""
        q, (k, v) = pair
        want = kv_reference.attend(q.double(), k, v, self.start, self.scale, dtype=torch.float64)
        for provider, attend in (("freeact", kv_attend_triton.attend), ("unpack, sdpa", unpacked)):
            got = attend(q, k, v, self.start, self.scale)
            self._row("relative_error", "attention", provider, float((got.double() - want).norm() / want.norm()))

    def write_one(self) -> None:
        """A new token's keys, rotated or not, and the same rotated by torch."""
        keys, _ = cached(self.batch, 256, self.device, True, True)
        new = self.random(self.batch, 1)
        out = torch.empty(self.batch, KEY_HEADS, 1, 68, dtype=torch.uint8, device=self.device)
        assert keys.mean is not None
        assert keys.rotation is not None
        means, rotation = keys.mean[None, :, None], keys.rotation
        plain, start = dataclasses.replace(keys, rotation=None), self.start
        for provider, call in (
            ("freeact", lambda: kv_write_triton.write_rows(new, keys, start, 200, out)),
            ("torch", lambda: out.copy_(encode((new.float() - means) @ rotation, 4, torch.bfloat16))),
            ("freeact, not rotated", lambda: kv_write_triton.write_rows(new, plain, start, 200, out)),
        ):
            self.record("write", provider, [call] * 8)

    def write_prompt(self) -> None:
        """The keys of a prompt of 2048 tokens, of one sequence."""
        prompt = self.random(1, 2048)
        room = torch.empty(1, KEY_HEADS, 2048, 68, dtype=torch.uint8, device=self.device)
        keys, _ = cached(1, 4096, self.device, True, True)
        plain, start = dataclasses.replace(keys, rotation=None), self.start[:1]
        for provider, there in (("freeact", keys), ("freeact, not rotated", plain)):
            self.record("write 2048", provider, [
                lambda there=there: kv_write_triton.write_rows(prompt, there, start, 0, room)
            ] * 8)  # fmt: skip

    def _row(self, metric: str, what: str, provider: str, value: float, **more) -> None:
        labels = {"batch": self.batch, "tokens": self.tokens, "metric": metric, "what": what, "provider": provider}
        self.rows.append({**labels, "value": value, **more})


@torch.no_grad()
def measure(batch: int, tokens: int, device: str) -> list[dict]:
    """Rows of one context."""
    context = Context(batch, tokens, device)
    context.attention_dense()
    for name, (means, rotate) in STORED.items():
        context.attention_stored(name, means, rotate)
    context.write_one()
    if batch == 1:
        context.write_prompt()
    return context.rows


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
