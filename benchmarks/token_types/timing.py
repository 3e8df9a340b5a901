"""What three token types cost in the linear layers: the same layers with one type and with three, timed in turn."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from statistics import fmean, median, pstdev

import torch
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.surgery import replace_group
from optimum_freeact.type_state import TypeState


# name -> (d, key/value width, intermediate): SmolLM2-135M, Llama-3.2-1B, Llama-3-8B
SHAPES = {"135m": (576, 192, 1536), "1b": (2048, 512, 8192), "8b": (4096, 1024, 14336)}
SECONDS = 0.35  # about as long for each size and build
BUILDS = 3
NAMES = {1: ["text"], 3: ["text", "sink", "mask"]}
COPIES = {"one": 1, "three": 3, "again": 1}


class _Linears(nn.Module):
    """The linear layers of one block, each group fed with an input of its own."""

    def __init__(self, d: int, kv: int, inner: int):
        super().__init__()
        sizes = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
        sizes |= {"gate_proj": (d, inner), "up_proj": (d, inner), "down_proj": (inner, d)}
        for name, (width, out) in sizes.items():
            self.add_module(name, nn.Linear(width, out, bias=False))

    def forward(self, x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
        """All of them; what is returned only keeps the work alive."""
        total = 0
        for names, given in ((("q_proj", "k_proj", "v_proj"), x), (("o_proj",), x), (("gate_proj", "up_proj"), x)):
            fresh = given.clone()  # another tensor for each group, as in a model
            for name in names:
                total = total + getattr(self, name)(fresh).flatten()[0]
        return total + self.down_proj(wide).flatten()[0]


def build(shape: tuple[int, int, int], n_types: int, device: str, preset: str) -> tuple[nn.Module, TypeState]:
    """Random quantized layers, ready to run."""
    rules = {"mask": [0]} if n_types == 3 else None
    config = FreeActConfig(preset=preset, token_types=NAMES[n_types], type_rules=rules)
    state, layers = TypeState(), _Linears(*shape)
    generator, d = torch.Generator(device=device).manual_seed(0), shape[0]
    for group in (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]):
        source, targets = replace_group(layers, group, config, state, device)
        source.mean.copy_(torch.randn(source.mean.shape, generator=generator, device=device))
        source.clip.copy_(torch.linspace(0.9, 0.7, len(source.clip)))  # types differ in all that they can differ in
        if source.basis is not None:
            source.basis.random_(-60, 61, generator=generator)
            source.basis_scale.fill_(0.02 * d**-0.5)
        for target in targets:
            target.type_bias.normal_(generator=generator)
            if target.type_shift is not None:
                target.type_shift.random_(-100, 101, generator=generator)
                target.type_shift_scale.fill_(0.02)
            if target.low_rank is not None:
                target.low_rank.random_(-100, 101, generator=generator)
                target.low_rank_scale.fill_(0.01)
            target.weight.data.random_(0, 256, generator=generator)
            target.qscale.fill_(0.01)
            if target.weight_group_scale is not None:
                target.weight_group_scale.fill_(100)
            target.prepare()
        getattr(source, "prepare", lambda: None)()
    return layers.to(device), state


@torch.no_grad()
def measure(
    device: str, tokens: list[int], shapes: list[str], presets: list[str], repeats: int = 100, builds: int = BUILDS
) -> Iterator[dict]:
    """Rows with the median seconds for one and for three types, their ratio, and that of two copies with one type, which
    says what of a ratio is noise.

    Layers are made several times, because where tensors lie in memory is part of their time. Each time the two copies and the
    layers with three types are run in turn, there and back, and the ratios of single turns are what medians are made of; the
    row has the mean over builds.
    """
    for preset, shape in itertools.product(presets, shapes):
        found: dict[int, list[dict]] = {n: [] for n in tokens}
        for build_number in range(builds):
            made = {name: build(SHAPES[shape], n, device, preset) for name, n in COPIES.items()}
            kept = torch.empty(1 + 4321 * build_number, device=device)  # the next ones lie elsewhere
            for n in tokens:
                found[n].append(_compare(made, shape, n, device, max(repeats // builds, 1)))
                if build_number == 0 and n > 1:
                    inputs = _inputs(shape, n, device)
                    found[n][0]["differences"] = differences(*made["three"], *inputs)
            del made, kept
        for n, parts in found.items():
            head = {"method": preset, "shape": shape, "tokens": n, "mode": parts[0]["mode"], "builds": builds}
            for metric in ("seconds_1_types", "seconds_3_types", "three_types_time_ratio", "one_type_time_ratio"):
                values = [part[metric] for part in parts]
                row = {"metric": metric, "value": fmean(values), **head}
                yield {**row, "spread": pstdev(values)} if "ratio" in metric else row
            yield from ({**row, **head} for row in parts[0].get("differences", []))


def _inputs(shape: str, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows for most layers, wide ones for the last, and their types, which alternate."""
    d, _, inner = SHAPES[shape]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, wide = (torch.randn(1, n, width, device=device, dtype=dtype) for width in (d, inner))
    return x, wide, torch.arange(n, device=device).remainder(2).mul(2).unsqueeze(0)


def _compare(made: dict, shape: str, n: int, device: str, most: int) -> dict:
    """Medians of one build at one number of tokens."""
    x, wide, types = _inputs(shape, n, device)
    calls, mode = {}, ""
    for name, (layers, state) in made.items():
        state.types = types if COPIES[name] > 1 else None
        calls[name], mode = _call(layers, state, x, wide)
    for call in calls.values():  # a GPU's first turns are slow
        _once(call, device)
    one = max(_once(call, device) for call in calls.values())
    turns = max(min(most, 5), min(most, int(SECONDS / (30 * one))))
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in list(calls) if turn % 2 else reversed(calls):
            spent[name].append(_once(calls[name], device))
    ones = [(a + b) / 2 for a, b in zip(spent["one"], spent["again"], strict=True)]
    return {
        "mode": mode,
        "seconds_1_types": median(ones),
        "seconds_3_types": median(spent["three"]),
        "three_types_time_ratio": median(c / a for a, c in zip(ones, spent["three"], strict=True)),
        "one_type_time_ratio": median(b / a for a, b in zip(spent["one"], spent["again"], strict=True)),
    }


def differences(
    layers: nn.Module, state: TypeState, x: torch.Tensor, wide: torch.Tensor, types: torch.Tensor
) -> list[dict]:
    """Outputs of a mixed batch that differ in any bit from those of batches of one type: of the same shape, and of the
    type's own tokens alone (which may be so few that another kernel runs them).
    """
    same = own = 0
    for name, linear in layers.named_children():
        if not isinstance(linear, nn.Linear):
            continue
        given = wide if name == "down_proj" else x
        state.types = types
        mixed = linear(given.clone())
        for kind in types.unique().tolist():
            chosen = types == kind
            state.types = torch.full_like(types, kind)
            same += int((linear(given.clone())[chosen] != mixed[chosen]).sum())
            state.types = types[chosen].unsqueeze(0)
            own += int((linear(given[chosen].unsqueeze(0))[0] != mixed[chosen]).sum())
    return [{"metric": f"mixed_batch_differences_{name}", "value": n} for name, n in (("same", same), ("own", own))]


def _call(layers: nn.Module, state: TypeState, x: torch.Tensor, wide: torch.Tensor):
    """A forward with the types as they are, on a GPU as a recorded graph (so that Python's own time does not count)."""
    types = state.types

    def forward() -> None:
        state.types = types
        layers(x, wide)

    if not x.is_cuda:
        return forward, "eager"
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    return graph.replay, "graph"


def _once(call, device: str) -> float:
    """Seconds of one forward; on a GPU the mean of ten in a row."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e4
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
