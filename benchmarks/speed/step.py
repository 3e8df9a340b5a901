"""What a decoding step has beside its linears: one token's attention over a static cache, by each of torch's ways, and the head.

    python -m benchmarks.speed.step --out DIR [--seconds 40]

Heads of an 8B Llama. Rows are appended to `step.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.speed.timing import copies_for, graph_microseconds


HEADS, SHARED, SIZE = 32, 8, 128  # of queries, of keys and values, and numbers of each
WIDTH, VOCABULARY = 4096, 128256
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ways(mask: torch.Tensor) -> dict[str, Way]:
    """Names and functions of queries `(1, heads, 1, size)`, keys and values `(1, shared, tokens, size)`."""
    grouped = HEADS // SHARED

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None].expand(-1, -1, grouped, -1, -1).flatten(1, 2)

    def repeat(q, k, v):
        return functional.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)

    def as_rows(q, k, v):
        return functional.scaled_dot_product_attention(q.view(1, SHARED, grouped, SIZE), k, v, attn_mask=mask)

    def shared(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def products(q, k, v):
        scores = q.view(SHARED, grouped, SIZE) @ k[0].mT * SIZE**-0.5
        weights = scores.float().masked_fill(~mask[0], float("-inf")).softmax(-1)
        return weights.to(v.dtype) @ v[0]

    def cudnn(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return shared(q, k, v)

    plain = {"repeated heads": repeat, "heads as rows": as_rows, "enable_gqa": shared, "two products": products}
    compiled = {
        f"{name}, compiled": torch.compile(plain[name], dynamic=False)
        for name in ("heads as rows", "enable_gqa", "two products")
    }
    return {**plain, "enable_gqa, cudnn": cudnn, **compiled}


def attention(device: str, tokens: int) -> dict[str, list[Callable]]:
    """Calls of each way, over as many caches as exceed the GPU's own."""
    copies = copies_for(2 * 2 * SHARED * tokens * SIZE) if device == "cuda" else 1
    make = lambda heads, n: torch.randn(1, heads, n, SIZE, device=device, dtype=torch.bfloat16)  # noqa: E731
    q, k, v = (
        [make(heads, n) for _ in range(copies)] for heads, n in ((HEADS, 1), (SHARED, tokens), (SHARED, tokens))
    )
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=device)
    mask[..., -4:] = False  # of a cache that is not full
    return {
        name: [lambda i=i, way=way: way(q[i], k[i], v[i]) for i in range(copies)] for name, way in ways(mask).items()
    }


def head(device: str, width: int, vocabulary: int) -> dict[str, list[Callable]]:
    """One row times the head: of bytes, on plain cores and on tensor cores, and of bfloat16."""
    from optimum_freeact.kernels import w8_triton

    x = torch.randn(1, width, device=device, dtype=torch.bfloat16)
    codes = torch.randint(-127, 128, (vocabulary, width), dtype=torch.int8, device=device)
    scale = torch.rand(vocabulary, device=device).bfloat16()
    plain = codes.bfloat16() * scale[:, None]
    return {
        "bytes": [lambda: w8_triton.w8_linear(x, codes, scale)],
        "bytes, tensor cores": [lambda: w8_triton.several_rows(x, codes, scale, {})],
        "bfloat16": [lambda: functional.linear(x, plain)],
    }


@torch.no_grad()
def main() -> None:
    """Measure until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60, help="stop after so long")
    parser.add_argument("--tokens", type=int, default=2120, help="room of the cache")
    args = parser.parse_args()
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    for what, calls in (("attention", attention("cuda", args.tokens)), ("head", head("cuda", WIDTH, VOCABULARY))):
        want = None
        for provider, each in calls.items():
            if time.monotonic() - begin > args.seconds:
                break
            row: dict = {"what": what, "provider": provider, "metric": "microseconds", "value": None}
            if what == "attention":
                row["tokens"] = args.tokens
            try:
                y = each[0]().flatten().float()
                want = y if want is None else want
                row["difference"] = round(float((y - want).norm() / want.norm()), 5)  # from the first way
                row["value"], row["spread"] = graph_microseconds(each, rounds=5, at_least=1e-3)
            except Exception as error:  # a way that this torch does not have
                row["note"] = f"{type(error).__name__}: {error}"[:200]
            text = json.dumps(row)
            print(text, flush=True)
            with open(args.out / "step.jsonl", "a", encoding="utf-8") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
