"""What three token types cost in the linear layers: the same layers with one type and with three, timed in turn."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from statistics import median

import torch
from torch import nn

from benchmarks.token_types.cost_claims import halves, noise, ratio
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.surgery import replace_group
from optimum_freeact.type_state import TypeState


# name -> (d, key/value width, intermediate): SmolLM2-135M, Llama-3.2-1B, Llama-3-8B
SHAPES = {"135m": (576, 192, 1536), "1b": (2048, 512, 8192), "8b": (4096, 1024, 14336)}
COPIES = 6  # of layers with one type, and as many with three
ROUNDS, FEWEST = 2000, 9  # of all copies, at most and at least
SECONDS, WARM = 0.6, 0.1  # about as long for each size
NAMES = {1: ["text"], 3: ["text", "sink", "mask"]}


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
    with torch.device("meta"):  # only their sizes count
        layers = _Linears(*shape)
    state = TypeState()
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
    device: str, tokens: list[int], shapes: list[str], presets: list[str], repeats: int = ROUNDS, copies: int = COPIES
) -> Iterator[dict]:
    """Rows with the seconds of every copy, their ratio and its noise (`cost_claims.ratio` and what stands beside it).

    Why copies, and why in this order, is said in `cost.py`.
    """
    for preset, shape in itertools.product(presets, shapes):
        made = _copies(shape, device, preset, copies)
        for n in tokens:
            head: dict = {"method": preset, "shape": shape, "tokens": n}
            spent, head["mode"] = _seconds(made, shape, n, device, repeats)
            yield from ({"metric": "seconds", **head, "types": k, "placement": i, "value": v} for k, i, v in spent)
            ones, threes = ([v for k, _, v in spent if k == kind] for kind in (1, 3))
            head["placements"] = copies
            yield {
                "metric": "three_types_time_ratio",
                **head,
                "value": ratio(ones, threes),
                "spread": noise(ones, threes),
            }
            middle, worst = halves(ones)
            yield {"metric": "one_type_worst_ratio", **head, "value": worst}
            yield {"metric": "one_type_time_ratio", **head, "value": middle}
            if n > 1 and shape == shapes[0]:  # what a mixed batch computes is a matter of kernels, not of sizes
                chosen = next((layers, state) for kind, layers, state in made if kind == 3)
                yield from ({**row, **head} for row in differences(*chosen, *_inputs(shape, n, device)))
        del made


def _copies(shape: str, device: str, preset: str, copies: int) -> list[tuple[int, nn.Module, TypeState]]:
    """Copies with one type and with three, made in a random order so that neither kind has the better places."""
    draw, kept, made = random.Random(0), [], []
    for kind in draw.sample([1, 3] * copies, 2 * copies):
        made.append((kind, *build(SHAPES[shape], kind, device, preset)))
        kept.append(torch.empty(draw.randrange(1, 1 << 20), device=device, dtype=torch.uint8))
    return made


def _inputs(shape: str, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows for most layers, wide ones for the last, and their types, which take turns."""
    d, _, inner = SHAPES[shape]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, wide = (torch.randn(1, n, width, device=device, dtype=dtype) for width in (d, inner))
    return x, wide, (torch.arange(n, device=device) + 2).remainder(3).unsqueeze(0)


def _seconds(made: list, shape: str, n: int, device: str, most: int) -> tuple[list[tuple[int, int, float]], str]:
    """Of each copy its types, number and median seconds; and how they were run."""
    calls, mode = [], ""
    x, wide, types = _inputs(shape, n, device)  # one for all, and kept: a recorded graph reads them where they lie
    for kind, layers, state in made:
        state.types = types if kind > 1 else None
        call, mode = _call(layers, state, x, wide)
        calls.append(call)
    draw, order = random.Random(0), list(range(len(calls)))
    for _ in range(2):
        one = max(_round(calls, order, device))
    warm, turns = (max(1, int(seconds / (len(calls) * one))) for seconds in (WARM, SECONDS))
    for _ in range(min(most, warm)):  # a GPU's first turns are slow
        _round(calls, order, device)
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(min(most, max(turns, FEWEST))):
        draw.shuffle(order)
        for i, seconds in zip(order, _round(calls, order, device), strict=True):
            spent[i].append(seconds)
    return [(kind, i, median(spent[i])) for i, (kind, *_) in enumerate(made)], mode


def _round(calls: list, order: list[int], device: str) -> list[float]:
    """Seconds of each call, one directly after the other."""
    if device == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
        marks[0].record()
        for i, mark in zip(order, marks[1:], strict=True):
            calls[i]()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    found = []
    for i in order:
        begun = time.perf_counter()
        calls[i]()
        found.append(time.perf_counter() - begun)
    return found


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
