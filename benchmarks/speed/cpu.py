"""Decoding and weight memory on a CPU: bfloat16, float32, and the quantized model through torch and through C.

    python -m benchmarks.speed.cpu --model smollm2=PATH --model qwen2.5=PATH --tied qwen2.5 --threads 1 2 [--rows FILE]

Qwen2.5-0.5B as published shares its head with the embeddings; the asset here, made from a quantized file, has two copies.
Models have their real shapes and random weights; neither time nor memory depends on the numbers. Providers take turns
token by token, so that a load on the machine falls on all alike. Claims are made of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, DynamicCache

from benchmarks.speed.llama import plain, quantized
from tools.result_files import command_line, write


PROVIDERS = ("bf16", "fp32", "freeact torch", "freeact")


def build(provider: str, config) -> torch.nn.Module:
    """A model whose linears run as the provider's name says."""
    if not provider.startswith("freeact"):
        model = plain(config, "cpu")
        return model.float() if provider == "fp32" else model
    os.environ["FREEACT_KERNELS"] = "torch" if provider.endswith("torch") else "native"
    try:
        return quantized(config, "cpu", preset="freeact-fast")
    finally:
        del os.environ["FREEACT_KERNELS"]


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors that a model holds: parameters, buffers, and what was prepared for the kernels."""
    seen = {}

    def add(value) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif hasattr(value, "tensors"):  # tables of kernels
            for tensor in value.tensors():
                add(tensor)

    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            add(value)
    return sum(seen.values())


@torch.no_grad()
def measure(name: str, config, prompts: list[int], tokens: int) -> list[dict]:
    """Rows of one model: seconds a token after the first prompt, seconds of each prompt, bytes of the weights."""
    rows, runs, prompt = [], {}, prompts[0]
    ids = torch.randint(0, config.vocab_size, (1, max(prompts)))
    for provider in PROVIDERS:
        model = build(provider, config)
        labels = {"model": name, "provider": provider, "threads": torch.get_num_threads()}
        rows.append({**labels, "metric": "weight_bytes", "value": held_bytes(model)})
        for length in sorted(prompts, reverse=True):  # the cache of the first is the one that decoding goes on with
            times = []
            for _ in range(3 if length == prompt else 2):
                start = time.perf_counter()
                cache = DynamicCache()
                model(input_ids=ids[:, :length], past_key_values=cache, use_cache=True, logits_to_keep=1)
                times.append(time.perf_counter() - start)
            rows.append({**labels, "metric": "prefill_seconds", "prompt": length, "value": statistics.median(times),
                         "spread": (max(times) - min(times)) / 2})  # fmt: skip
        runs[provider] = (model, cache, [])
    for _ in range(tokens):
        for model, cache, times in runs.values():
            start = time.perf_counter()
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
    for provider, (_, _, times) in runs.items():
        quartiles = statistics.quantiles(times, n=4)
        rows.append({"model": name, "provider": provider, "threads": torch.get_num_threads(), "prompt": prompt,
                     "metric": "decode_seconds", "value": statistics.median(times),
                     "spread": (quartiles[2] - quartiles[0]) / 2})  # fmt: skip
    return rows


def main() -> None:
    """Measure and write `benchmarks/results/speed_cpu.json`, or only print with `--rows`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument(
        "--tied", action="append", default=[], metavar="NAME", help="a head that shares the embeddings"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256], help="lengths, the shortest first")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rows", type=Path, help="write bare rows here instead of a result file")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for threads, given in itertools.product(args.threads, args.model):
        torch.set_num_threads(threads)
        name, _, path = given.partition("=")
        config = AutoConfig.from_pretrained(path)
        config._attn_implementation = "sdpa"
        config.tie_word_embeddings = config.tie_word_embeddings or name in args.tied
        for row in measure(name, config, args.prompts, args.tokens):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.rows:
        args.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        print(write("speed_cpu", rows, "benchmarks.speed.cpu_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
