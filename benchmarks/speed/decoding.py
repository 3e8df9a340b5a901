"""A random prompt before a model, and the tokens that are decoded after it, the same way however a token's step is run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, PretrainedConfig, StaticCache

from benchmarks.speed.timing import quiet, synchronize


WARM, SAID = 4, 16  # tokens before those that are timed; tokens by which two ways to run are compared


Step = Callable[..., torch.Tensor]  # of tokens and their positions: logits of the last


class Prompt:
    """Random tokens, the model that reads them, and a static cache with room for `tokens` more."""

    def __init__(self, model, config: PretrainedConfig, length: int, tokens: int, device: str):
        self.model, self.config, self.device = model, config, device
        self.ids = torch.randint(0, config.vocab_size, (1, length), device=device)
        self.cache = StaticCache(config=config, max_cache_len=length + max(WARM + tokens, SAID) + 4)
        self.positions = torch.arange(length, device=device)[None]

    def step(self, tokens: torch.Tensor, where: torch.Tensor, states: Cache | None = None) -> torch.Tensor:
        """Logits of the last of `tokens`, into the static cache or the given one."""
        states = self.cache if states is None else states
        return self.model(
            input_ids=tokens, position_ids=where, past_key_values=states, use_cache=True, logits_to_keep=1
        ).logits

    def prefill(self, step: Step | None = None) -> torch.Tensor:
        """Into the emptied static cache, by the model as it is or by a compiled step."""
        self.cache.reset()
        return (step or self.step)(self.ids, self.positions)

    def prefill_dynamic(self, step: Step | None = None) -> torch.Tensor:
        """Into a cache that grows, for which the causal mask need not be made: attention's fastest kernel."""
        return (step or self.step)(self.ids, self.positions, DynamicCache(config=self.config))


class Decoder:
    """Tokens one after the other. CUDA graphs read the token and its position where they were captured, so both tensors are
    written in place, never replaced. Made after the prefill is measured, whose peak they are no part of.
    """

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self.token = prompt.ids[:, :1].clone()
        self.where = torch.full((1, 1), prompt.ids.shape[1], device=prompt.device)

    def captured_step(self) -> Step:
        """A step as a CUDA graph; its arguments are this object's token and position, where the graph finds them itself."""
        graph, kept = captured(lambda: self.prompt.step(self.token, self.where))

        def replayed(token, where):  # noqa: ARG001
            graph.replay()
            return kept

        return replayed

    def decode(self, step: Step, tokens: int) -> float:
        """Seconds a token, of `tokens` after the prompt and a few to warm up."""
        self._begin()
        for _ in range(WARM):
            self._next(step)
        synchronize(self.prompt.device)
        start = time.perf_counter()
        for _ in range(tokens):
            self._next(step)
        synchronize(self.prompt.device)
        return (time.perf_counter() - start) / tokens

    def said(self, step: Step) -> int:
        """A sum over some tokens, by which to see whether two ways to run agree."""
        self._begin()
        self.token.copy_(self.prompt.ids[:, :1])
        total = 0
        for place in range(SAID):
            self._next(step)
            total += (place + 1) * int(self.token)
        return total

    def _begin(self) -> None:
        """The prompt into the cache; the position behind it."""
        self.prompt.cache.reset()
        self.prompt.prefill()
        self.where.fill_(self.prompt.ids.shape[1])

    def _next(self, step: Step) -> None:
        """The likeliest token after the last one."""
        self.token.copy_(step(self.token, self.where)[:, -1:].argmax(-1))
        self.where.add_(1)


def captured(function: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
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
