"""What three token types cost in the linear layers: the same layers with one type and with three, timed in turn."""

from __future__ import annotations

import itertools
import time
from statistics import median

import torch
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.surgery import replace_group
from optimum_freeact.type_state import TypeState


# name -> (d, key/value width, intermediate): SmolLM2-135M, Llama-3.2-1B, Llama-3-8B
SHAPES = {"135m": (576, 192, 1536), "1b": (2048, 512, 8192), "8b": (4096, 1024, 14336)}
SECONDS = 1.0  # about as long for each size
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
def measure(device: str, tokens: list[int], shapes: list[str], presets: list[str], repeats: int = 100) -> list[dict]:
    """Rows with the median seconds for one and for three types, timed alternately, and their ratio."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = []
    for preset, name in itertools.product(presets, shapes):
        d, _, inner = SHAPES[name]
        made = {n: build(SHAPES[name], n, device, preset) for n in NAMES}
        for n_tokens in tokens:
            torch.manual_seed(0)
            x = torch.randn(1, n_tokens, d, device=device, dtype=dtype)
            wide = torch.randn(1, n_tokens, inner, device=device, dtype=dtype)
            types = torch.arange(n_tokens, device=device).remainder(2).mul(2).unsqueeze(0)
            calls = {}
            for n, (layers, state) in made.items():
                state.types = types if n > 1 else None
                calls[n], mode = _call(layers, state, x, wide)
            seconds: dict[int, list[float]] = {n: [] for n in NAMES}
            one = max(_once(call, device) for call in calls.values())
            turns = max(min(repeats, 5), min(repeats, int(SECONDS / (20 * one))))
            for turn in range(turns + 3):
                for n, call in calls.items():
                    spent = _once(call, device)
                    if turn >= 3:
                        seconds[n].append(spent)
            middle = {n: median(values) for n, values in seconds.items()}
            head = {"method": preset, "shape": name, "tokens": n_tokens, "mode": mode}
            rows += [{"metric": f"seconds_{n}_types", "value": value, **head} for n, value in middle.items()]
            rows.append({"metric": "three_types_time_ratio", "value": middle[3] / middle[1], **head})
            if n_tokens > 1:
                rows += [{**row, **head} for row in differences(*made[3], x, wide, types)]
    return rows


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
