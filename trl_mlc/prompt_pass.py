"""Run parallel prompts inside the wrapped model's own forward.

Inside, because only there are parameters gathered (FSDP, ZeRO-3) and seen by DistributedDataParallel. The prompts are
handed over beside the arguments: trainers forward unknown arguments to the reference model too.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from trl_mlc.early_exit import decoder_of, encode_prompts
from trl_mlc.extractor import Extractor
from trl_mlc.packing import MOST_TOKENS, encode_packed


MODULE = "mlc_extractor"
FIELD = "mlc_representations"


class PromptStates(NamedTuple):
    """Pooled hidden states `(P, hidden_size)`, detached, and what the extractor makes of them `(P, dim)`."""

    hidden_states: torch.Tensor | None
    representations: torch.Tensor


class PromptPass:
    """The prompt group's pass through a model, taken on the first eligible forward after it was requested.

    Eligible is any forward in evaluation, and one with gradients in training: KTO estimates its KL term, and PEFT its
    reference, by forwards of the same module without gradients, which must not swallow the prompts.

    Args:
        model (`nn.Module`): the base model (without a PEFT wrapper). Its `forward` is replaced on the instance.
        extractor ([`Extractor`]): becomes a submodule, so that it is optimised, synchronised and sharded with it.
        layer (`int`): index into the hidden states.
        pooling (`str`): `"last"` or `"mean"`.
        buckets (`int`): see [`~trl_mlc.early_exit.encode_prompts`]; 0 for [`~trl_mlc.packing.encode_packed`].
    """

    def __init__(self, model: nn.Module, extractor: Extractor, layer: int, pooling: str, buckets: int):
        self.layer, self.pooling, self.buckets = layer, pooling, buckets
        self.extractor = extractor
        self._decoder = decoder_of(model)
        self._request: tuple[dict | None, torch.Tensor | None] | None = None
        self._states: PromptStates | None = None
        self._attach(model)

    def request(self, prompts: dict | None, offsets: torch.Tensor | None = None) -> None:
        """Ask the next eligible forward to run `prompts`, minus `offsets` (P, hidden_size) before the extractor.

        `None` runs no prompt but still touches the extractor, so that no process waits for its gradient.
        """
        self._request, self._states = (prompts, offsets), None

    def take(self) -> PromptStates | None:
        """What the last request found, once; `None` if no eligible forward happened."""
        states, self._states, self._request = self._states, None, None
        return states

    def _attach(self, model: nn.Module) -> None:
        model.add_module(MODULE, self.extractor)
        own = {f"{MODULE}.{name}" for name in self.extractor.state_dict()}
        model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | own
        original = model.forward

        @functools.wraps(original)
        def forward(*args, **kwargs):
            with_gradients = torch.is_grad_enabled()
            if self._request is None or (model.training and not with_gradients):
                return original(*args, **kwargs)
            request, self._request = self._request, None
            early = self._run(*request, training=model.training) if self._goes_first(request[0]) else None
            outputs = original(*args, **kwargs)
            self._states = early or self._run(*request, training=model.training)
            # DistributedDataParallel finds used parameters by walking back from the outputs
            return _with_field(outputs, self._states.representations) if with_gradients else outputs

        model.forward = forward

    def _goes_first(self, prompts: dict | None) -> bool:
        """Whether the prompts run before the host's rows, and so backward after them.

        A few prompts can keep a GPU waiting for Python, unless it has the host's backward to do meanwhile. Many don't, and
        what they keep in memory should be gone before that. Where parameters are sharded (one bucket), processes must
        agree on the order, and prompts come last.
        """
        return prompts is not None and self.buckets != 1 and sum(prompts["lengths"]) <= MOST_TOKENS

    def _run(self, prompts: dict | None, offsets: torch.Tensor | None, training: bool) -> PromptStates:
        if prompts is None:
            weight = next(self._decoder.parameters())
            empty = torch.zeros(1, self._decoder.config.hidden_size, device=weight.device)
            return PromptStates(None, self.extractor(empty) * 0.0)
        with _rng_restored(prompts["input_ids"].device) if training else nullcontext():
            hidden_states = self._encode(prompts)
        centred = hidden_states.float() if offsets is None else hidden_states.float() - offsets
        return PromptStates(hidden_states.detach(), self.extractor(centred))

    def _encode(self, prompts: dict) -> torch.Tensor:
        ids = prompts["input_ids"]
        if self.buckets == 0:
            return encode_packed(self._decoder, ids, prompts["lengths"], self.layer, self.pooling)
        return encode_prompts(
            self._decoder, ids, prompts["attention_mask"], self.layer, self.pooling, self.buckets, prompts["lengths"]
        )


def _rng_restored(device: torch.device):
    """Leave the random streams as they were: dropout of the main loss must not depend on the term."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _with_field(outputs, representations: torch.Tensor):
    """A copy of a model output with one more dataclass field, which DDP and accelerate rebuild field by field."""
    kind: type = type(outputs)
    cls = _with_field_class(kind)
    return cls(**dict(outputs.items()), **{FIELD: representations})


@functools.cache
def _with_field_class(cls: type) -> type:
    made = dataclasses.make_dataclass(cls.__name__, [(FIELD, torch.Tensor | None, None)], bases=(cls,))
    made.__module__ = cls.__module__
    return made
