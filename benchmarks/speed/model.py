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
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama

from benchmarks.speed.decoding import Decoder, Prompt, Step, captured
from benchmarks.speed.llama import plain, quantized, shape_config
from benchmarks.speed.timing import quiet, synchronize


RUNS = ("memory", "eager", "graph", "parts", "compile", "compile-pdl")


class Meter:
    """Times prefills, prints rows and appends them to a file."""

    def __init__(self, out: Path, device: str, rounds: int, **labels):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.labels = out / "model.jsonl", labels
        self.device, self.rounds = device, rounds

    def __call__(self, metric: str, value: float | None, **more) -> None:
        text = json.dumps({**self.labels, "metric": metric, "value": value, **more})
        print(text, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def prefill(self, call: Callable, how: str) -> None:
        """The time of a prefill."""
        value, spread = seconds(call, self.device, self.rounds)
        self("prefill_seconds", value, spread=spread, how=how)

    def prefill_graph(self, call: Callable[[], torch.Tensor], how: str) -> None:
        """A prefill as a CUDA graph: what the GPU alone needs for it."""
        try:
            graph, _ = captured(call)
            self.prefill(graph.replay, how)
        except RuntimeError as error:
            self("prefill_seconds", None, how=how, note=f"{type(error).__name__}: {error}"[:200])


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


def arguments() -> argparse.Namespace:
    """What the command line asks for; what cannot be run is refused."""
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
    if args.run == "compile-pdl":
        inductor = importlib.import_module("torch._inductor.config").triton
        if not hasattr(inductor, "enable_pdl"):
            parser.error(f"torch {torch.__version__} has no such setting")
        inductor.enable_pdl = True
    return args


def provider_name(args: argparse.Namespace) -> str:
    """The name in the rows: `bf16`, or a preset's."""
    if args.provider != "freeact":
        return args.provider
    return args.preset + ("" if args.embedding_bits == 8 else ", bfloat16 embeddings")


def measure_build(args: argparse.Namespace, config: PretrainedConfig, meter: Meter) -> PreTrainedModel:
    """A model on its device, how long that takes and how many bytes it has."""
    begin = time.perf_counter()
    with quiet():
        if args.provider == "freeact":
            model = quantized(config, meter.device, preset=args.preset, embedding_bits=args.embedding_bits)
        else:
            model = plain(config, meter.device)
    if args.run == "parts":
        compile_parts()
    synchronize(meter.device)
    meter("build_seconds", time.perf_counter() - begin)
    if meter.device == "cuda":
        meter("weight_bytes", torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    return model


def measure_prefill(prompt: Prompt, run: str, meter: Meter) -> None:
    """The first prefill, whose logits are kept while the others run and count in their peak; then the time of those."""
    first = time.perf_counter()
    with quiet():
        logits = prompt.prefill()
        synchronize(meter.device)
    meter("first_prefill_seconds", time.perf_counter() - first)
    if not torch.isfinite(logits).all():
        meter("finite", 0.0)
    if run != "parts":
        meter.prefill(prompt.prefill, "eager")
        if meter.device == "cuda":
            meter("peak_bytes", torch.cuda.max_memory_allocated())


def step_of(run: str, decoder: Decoder) -> Step:
    """How one token is decoded: by a CUDA graph, compiled, or by the model as it is."""
    device = decoder.prompt.device
    if run in ("graph", "parts") and device == "cuda":
        return decoder.captured_step()
    if run.startswith("compile"):
        mode = "reduce-overhead" if device == "cuda" else "default"
        return torch.compile(decoder.prompt.step, mode=mode, fullgraph=True)
    return decoder.prompt.step


def measure_decoding(decoder: Decoder, step: Step, args: argparse.Namespace, meter: Meter) -> None:
    """Decoding after the first time, which compiles and counts by itself, and what was said."""
    begin = time.perf_counter()
    # only a compiler, which takes long and needs the GPU little, works while others are timed
    with contextlib.nullcontext() if args.run.startswith("compile") else quiet():
        decoder.decode(step, args.tokens)
    meter("first_decode_seconds", time.perf_counter() - begin)
    found = []
    for _ in range(5):
        with quiet():
            found.append(decoder.decode(step, args.tokens))
    meter("decode_seconds", statistics.median(found), spread=(max(found) - min(found)) / 2)
    with quiet():
        total = decoder.said(step)
    meter("tokens", total)
    if meter.device == "cuda":
        meter("peak_bytes_decode", torch.cuda.max_memory_allocated())
        if args.kernels:
            print_kernels("decode", lambda: step(decoder.token, decoder.where), meter.device)


def measure_graphs(prompt: Prompt, args: argparse.Namespace, meter: Meter) -> None:
    """Prefills of the eager model, its parts compiled or not, as CUDA graphs."""
    how = "graph" if args.run == "graph" else "parts compiled, graph"
    meter.prefill_graph(prompt.prefill, how)
    meter.prefill_graph(prompt.prefill_dynamic, f"{how}, growing cache")
    if args.kernels:
        print_kernels("prefill", prompt.prefill_dynamic, meter.device)


def measure_compiled(prompt: Prompt, meter: Meter) -> None:
    """Prefills compiled as a whole, from a compiler that has forgotten the step of one token."""
    torch._dynamo.reset()
    compiled = torch.compile(prompt.step, fullgraph=True)
    begin = time.perf_counter()
    prompt.prefill(compiled)
    synchronize(meter.device)
    meter("first_compiled_prefill_seconds", time.perf_counter() - begin)
    meter.prefill(lambda: prompt.prefill(compiled), "compile")
    if meter.device == "cuda":
        meter.prefill_graph(lambda: prompt.prefill(compiled), "compile, graph")
        meter.prefill_graph(lambda: prompt.prefill_dynamic(compiled), "compile, graph, growing cache")


@torch.no_grad()
def main() -> None:
    """One provider, one way to run."""
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = shape_config(args.shape, args.layers, args.attention)
    meter = Meter(
        args.out, device, args.rounds, provider=provider_name(args), run=args.run, shape=args.shape,
        layers=config.num_hidden_layers, prompt=args.prompt, attention=args.attention,
    )  # fmt: skip
    model = measure_build(args, config, meter)
    prompt = Prompt(model, config, args.prompt, args.tokens, device)
    measure_prefill(prompt, args.run, meter)
    if args.run == "memory":
        return
    decoder = Decoder(prompt)
    step = step_of(args.run, decoder)
    measure_decoding(decoder, step, args, meter)
    if args.run in ("graph", "parts") and device == "cuda":
        measure_graphs(prompt, args, meter)
    if args.run == "compile" and not args.skip_compiled_prefill:
        measure_compiled(prompt, meter)


if __name__ == "__main__":
    main()
