"""Experts of a mixture on a CPU: time of a layer's experts, and their bytes, in bfloat16 and quantized.

    python -m benchmarks.speed.experts [--rows FILE]

One block of experts with the sizes of Qwen3-30B-A3B (2048 wide, 768 inside, 8 of 128 experts a token) or Mixtral-8x7B (4096,
14336, 2 of 8), random weights, random routing. bfloat16 runs each way that transformers has; the fastest is its row.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.branch_rank import rank_of
from optimum_freeact.modules.experts import FreeActExperts
from optimum_freeact.modules.surgery import float32_default
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.type_state import TypeState
from tools.result_files import command_line, write


# a quarter of the experts of the first: those that no token reaches cost nothing but memory
SHAPES = {
    "qwen3-30b-a3b": (Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=32), 8),
    "mixtral-8x7b": (MixtralExperts, MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8), 2),
}
WAYS = ("eager", "batched_mm", "grouped_mm")


def plain(name: str) -> nn.Module:
    """Random experts in bfloat16."""
    kind, config, _ = SHAPES[name]
    config._experts_implementation = "eager"
    made = kind(config).bfloat16()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.02)
    return made.eval().requires_grad_(False)


@torch.no_grad()
def quantized(module: nn.Module) -> FreeActExperts:
    """The same in the default preset, with random numbers for all that it stores."""
    config, state = FreeActConfig(token_types=["text", "sink"]), TypeState()
    config.weight_dtype = "bfloat16"
    with float32_default():
        made = FreeActExperts(module, config, state, functools.partial(rank_of, config))
    for name, tensor in made.own_tensors().items():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        elif tensor.dtype == torch.int8:
            tensor.random_(1, 127)
        else:
            tensor.fill_(2e-5 if "scale" in name else 0.0)
    for side in made.modules():
        if isinstance(side, FreeActInput):
            found = side.input_map()
            for factor in ("left", "right"):
                matrix = getattr(found, factor)
                setattr(found, factor, flat_rotation(len(matrix), torch.Generator().manual_seed(0)).float())
            found.basis = torch.linalg.qr(torch.randn(side.in_features, side.basis.shape[1]))[0]
            side.store(found)
            side.prepare()
    made.prepare()
    return made


def held_bytes(module: nn.Module) -> int:
    """Bytes of all that a module of experts holds, what was prepared for kernels included."""
    seen = {}
    tensors = [*module.parameters(), *module.buffers()]
    if isinstance(module, FreeActExperts):
        tensors += [t for pair in module._linears for linear in pair for t in linear._native.tensors()]
        tensors += [t for side in module.modules() if isinstance(side, FreeActInput) for t in side._native.tensors()]
    for tensor in tensors:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


@torch.no_grad()
def measure(name: str, tokens: int, rounds: int) -> list[dict]:
    """Rows of one shape: bytes, and milliseconds of the experts for so many tokens."""
    _, config, k = SHAPES[name]
    width, generator, rows = config.hidden_size, torch.Generator().manual_seed(1), []
    labels = {"model": name, "threads": torch.get_num_threads()}
    original = plain(name)
    n = original.num_experts
    calls = []
    for _ in range(rounds):
        weights, index = torch.rand(tokens, n, generator=generator).topk(k, -1)
        calls.append((torch.randn(tokens, width, generator=generator).bfloat16(), index, weights.bfloat16()))

    def timed(provider: str, module: nn.Module) -> dict:
        module(*calls[0])
        times = []
        for call in calls:
            start = time.perf_counter()
            module(*call)
            times.append((time.perf_counter() - start) * 1e3)
        quartiles = statistics.quantiles(times, n=4)
        return {**labels, "provider": provider, "metric": "milliseconds", "tokens": tokens,
                "value": statistics.median(times), "spread": (quartiles[2] - quartiles[0]) / 2}  # fmt: skip

    ways = []
    for way in (
        WAYS if tokens == 1 else ("eager", "grouped_mm")
    ):  # the other copies an expert's weights for every token
        config._experts_implementation = way
        ways.append({**timed("bf16", original), "note": way})
    config._experts_implementation = "eager"
    rows.append(min(ways, key=lambda row: row["value"]))
    rows.append({**labels, "provider": "bf16", "metric": "bytes", "value": held_bytes(original)})
    ours = quantized(original)
    rows.append(timed("freeact", ours))
    rows.append({**labels, "provider": "freeact", "metric": "bytes", "value": held_bytes(ours)})
    return rows


def main() -> None:
    """Measure and write `benchmarks/results/speed_experts.json`, or only print with `--rows`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", type=Path, help="write bare rows here instead of a result file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for name in SHAPES:
        for tokens in (1, 64):
            for row in measure(name, tokens, args.rounds):
                print(json.dumps(row), flush=True)
                if row not in rows:
                    rows.append(row)
    if args.rows:
        args.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        print(write("speed_experts", rows, "benchmarks.speed.no_claims", command_line(), [0]))


if __name__ == "__main__":
    main()
