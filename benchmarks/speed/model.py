"""Memory, prefill and decoding of a whole model of a Llama's shape with random weights, for one provider.

    python -m benchmarks.speed.model --provider freeact --run compile --out DIR

`--run` is `memory` (one prefill), `eager`, `graph` (the eager model as CUDA graphs), `parts` (the same with what lies between
linears compiled: norms, gates, rotary embedding), `compile` (`torch.compile` of the whole with CUDA graphs, as transformers
itself does with a static cache) or `compile-pdl` (the same, and the compiler's kernels too may start before the ones they wait
for have ended: programmatic dependent launch, a setting of Inductor). Rows are appended to `model.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

from benchmarks.speed.llama import plain, quantized, shape_config
from benchmarks.speed.timing import quiet


RUNS = ("memory", "eager", "graph", "parts", "compile", "compile-pdl")
WARM, SAID = 4, 16  # tokens before those that are timed; tokens by which two ways to run are compared


class Meter:
    """Prints rows and appends them to a file."""

    def __init__(self, out: Path, **labels):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.labels = out / "model.jsonl", labels

    def __call__(self, metric: str, value: float | None, **more) -> None:
        text = json.dumps({**self.labels, "metric": metric, "value": value, **more})
        print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def compile_parts() -> None:
    """Compile what lies between the linears of a Llama, one small function each: the same for any linears."""
    norm = torch.compile(
        lambda x, weight, epsilon: (
            weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
        ),
        dynamic=False,
    )
    gate = torch.compile(lambda a, b: torch.nn.functional.silu(a) * b, dynamic=False)
    modeling_llama.LlamaRMSNorm.forward = lambda self, x: norm(x, self.weight, self.variance_epsilon)
    modeling_llama.LlamaMLP.forward = lambda self, x: self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))
    modeling_llama.apply_rotary_pos_emb = torch.compile(modeling_llama.apply_rotary_pos_emb, dynamic=False)


def print_kernels(name: str, call, device: str) -> None:
    """A table of what runs on the GPU in one call, longest first."""
    call()
    synchronize(device)
    kinds = [torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        synchronize(device)
    spans = sorted((e.time_range.start, e.time_range.end) for e in profile.events() if e.self_device_time_total)
    idle, end = 0.0, spans[0][0] if spans else 0.0
    for start, stop in spans:
        idle, end = idle + max(0.0, start - end), max(end, stop)
    print(f"{name}: {end - spans[0][0] if spans else 0.0:9.1f} us, of which nothing ran in {idle:.1f}", flush=True)
    for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:24]:
        print(f"{name}: {event.self_device_time_total:9.1f} us in {event.count:4d} of {event.key[:90]}", flush=True)


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call, device: str, rounds: int) -> tuple[float, float]:
    """Median and spread of the time of a call."""
    found = []
    with quiet():
        for _ in range(rounds):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            found.append(time.perf_counter() - start)
    return statistics.median(found), (max(found) - min(found)) / 2


@torch.no_grad()
def main() -> None:
    """One provider, one way to run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--provider", choices=("bf16", "freeact"), required=True)
    parser.add_argument("--run", choices=RUNS, default="graph")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--attention", choices=("sdpa", "sdpa_gqa"), default="sdpa_gqa")
    parser.add_argument(
        "--preset", default="freeact-fastest", help="of `--provider freeact`, whose rows bear its name"
    )
    parser.add_argument("--embedding-bits", type=int, choices=(8, 16), default=8, help="of the quantized model")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skip-compiled-prefill", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="print what runs on the GPU")
    args = parser.parse_args()
    if min(args.prompt, args.tokens, args.rounds) < 1:
        parser.error(
            f"--prompt {args.prompt}, --tokens {args.tokens}, --rounds {args.rounds}: each must be at least 1"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.run == "compile-pdl":
        inductor = importlib.import_module("torch._inductor.config").triton
        if not hasattr(inductor, "enable_pdl"):
            parser.error(f"torch {torch.__version__} has no such setting")
        inductor.enable_pdl = True
    torch.manual_seed(0)
    config = shape_config(args.shape, args.layers, args.attention)
    name = args.provider
    if name == "freeact":
        name = args.preset
        name += "" if args.embedding_bits == 8 else ", bfloat16 embeddings"
    meter = Meter(
        args.out, provider=name, run=args.run, shape=args.shape, layers=config.num_hidden_layers,
        prompt=args.prompt, attention=args.attention,
    )  # fmt: skip
    begin = time.perf_counter()
    with quiet():
        if args.provider == "freeact":
            model = quantized(config, device, preset=args.preset, embedding_bits=args.embedding_bits)
        else:
            model = plain(config, device)
    if args.run == "parts":
        compile_parts()
    synchronize(device)
    meter("build_seconds", time.perf_counter() - begin)
    if device == "cuda":
        meter("weight_bytes", torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, config.vocab_size, (1, args.prompt), device=device)
    cache = StaticCache(config=config, max_cache_len=args.prompt + max(WARM + args.tokens, SAID) + 4)
    positions = torch.arange(args.prompt, device=device)[None]

    def prefill():
        cache.reset()
        return step(ids, positions)

    def prefill_dynamic():
        """Into a cache that grows, for which the causal mask need not be made: attention's fastest kernel."""
        return step(ids, positions, DynamicCache(config=config))

    def step(tokens, where, states=cache):
        return model(
            input_ids=tokens, position_ids=where, past_key_values=states, use_cache=True, logits_to_keep=1
        ).logits

    first = time.perf_counter()
    with quiet():
        logits = prefill()
        synchronize(device)
    meter("first_prefill_seconds", time.perf_counter() - first)
    if not torch.isfinite(logits).all():
        meter("finite", 0.0)
    if args.run != "parts":
        value, spread = seconds(prefill, device, args.rounds)
        meter("prefill_seconds", value, spread=spread, how="eager")
        if device == "cuda":
            meter("peak_bytes", torch.cuda.max_memory_allocated())
    if args.run == "memory":
        return
    token, where = ids[:, :1].clone(), torch.full((1, 1), args.prompt, device=device)

    def decode(call) -> None:
        cache.reset()
        prefill()
        where.fill_(args.prompt)
        for _ in range(WARM):
            token.copy_(call(token, where)[:, -1:].argmax(-1))
            where.add_(1)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(args.tokens):
            token.copy_(call(token, where)[:, -1:].argmax(-1))
            where.add_(1)
        synchronize(device)
        found.append((time.perf_counter() - start) / args.tokens)

    def said(call, count: int = SAID) -> int:
        """A sum over some tokens, by which to see whether two ways to run agree."""
        cache.reset()
        prefill()
        where.fill_(args.prompt)
        token.copy_(ids[:, :1])
        total = 0
        for place in range(count):
            token.copy_(call(token, where)[:, -1:].argmax(-1))
            where.add_(1)
            total += (place + 1) * int(token)
        return total

    def captured(function):
        """A call as a CUDA graph, and what it returns."""
        with quiet():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = function()
        return graph, kept

    def measure_graph(function, how: str) -> None:
        """A prefill as a CUDA graph: what the GPU alone needs for it."""
        try:
            graph, _ = captured(function)
            value, spread = seconds(graph.replay, device, args.rounds)
            meter("prefill_seconds", value, spread=spread, how=how)
        except RuntimeError as error:
            meter("prefill_seconds", None, how=how, note=f"{type(error).__name__}: {error}"[:200])

    found: list[float] = []
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = step
    if args.run in ("graph", "parts") and device == "cuda":
        graph, kept = captured(lambda: step(token, where))

        def replayed(token, where):  # noqa: ARG001
            graph.replay()
            return kept

        call = replayed
    elif args.run.startswith("compile"):
        call = torch.compile(step, mode="reduce-overhead" if device == "cuda" else "default", fullgraph=True)
    begin = time.perf_counter()
    # only a compiler, which takes long and needs the GPU little, works while others are timed
    with contextlib.nullcontext() if args.run.startswith("compile") else quiet():
        decode(call)
    meter("first_decode_seconds", time.perf_counter() - begin)
    for _ in range(5):
        with quiet():
            decode(call)
    meter("decode_seconds", statistics.median(found[1:]), spread=(max(found[1:]) - min(found[1:])) / 2)
    with quiet():
        total = said(call)
    meter("tokens", total)
    if device == "cuda":
        meter("peak_bytes_decode", torch.cuda.max_memory_allocated())
        if args.kernels:
            print_kernels("decode", lambda: call(token, where), device)
    if args.run in ("graph", "parts") and device == "cuda":
        how = "graph" if args.run == "graph" else "parts compiled, graph"
        measure_graph(prefill, how)
        measure_graph(prefill_dynamic, f"{how}, growing cache")
        if args.kernels:
            print_kernels("prefill", prefill_dynamic, device)
    if args.run == "compile" and not args.skip_compiled_prefill:
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True)

        def prefill_compiled():
            cache.reset()
            return compiled(ids, positions)

        begin = time.perf_counter()
        prefill_compiled()
        synchronize(device)
        meter("first_compiled_prefill_seconds", time.perf_counter() - begin)
        value, spread = seconds(prefill_compiled, device, args.rounds)
        meter("prefill_seconds", value, spread=spread, how="compile")
        if device == "cuda":
            measure_graph(prefill_compiled, "compile, graph")
            measure_graph(
                lambda: compiled(ids, positions, DynamicCache(config=config)), "compile, graph, growing cache"
            )


if __name__ == "__main__":
    main()
