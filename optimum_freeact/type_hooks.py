"""How the types of a forward's tokens reach every quantized linear and the KV cache.

They are written to a [`TypeState`] by a hook on the decoder, and read by the modules inside. They stay until the next forward,
because gradient checkpointing recomputes blocks later. A decoder inside a multimodal model gets embeddings, no ids: there a hook
on each module around it that still sees ids notes what they say.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from optimum_freeact.token_types import TokenTyper, tokens_of
from optimum_freeact.type_rules import MODULES
from optimum_freeact.type_state import TypeState


def _bind(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    return dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs if args else kwargs


class _TyperHook:
    """The pre-hook on the decoder; an object, so that it is copied together with its module and state."""

    def __init__(self, typer: TokenTyper, state: TypeState):
        self.typer, self.state = typer, state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.state.types = self.typer(_bind(module, args, kwargs), self.state.take(), self.state.given)


class _OuterHook:
    """The pre-hook on a module around the decoder. The outermost starts afresh, those inside add what they see."""

    def __init__(self, typer: TokenTyper, state: TypeState, outermost: bool):
        self.typer, self.state, self.outermost = typer, state, outermost

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen = self.typer.see(_bind(module, args, kwargs))
        if self.outermost or seen.marks is not None:
            self.state.note(seen)


class _PartHook:
    """The pre-hook on a module whose tokens are all of one type, whatever their ids."""

    def __init__(self, kind: int, state: TypeState):
        self.kind, self.state = kind, state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = _bind(module, args, kwargs)
        tokens = arguments.get("decoder_input_ids")
        tokens = tokens_of(arguments) if tokens is None else tokens
        self.state.types = None
        if self.kind > 0 and tokens is not None:
            self.state.types = torch.full(tokens.shape[:2], self.kind, device=tokens.device)


def install_typer(decoder: nn.Module, typer: TokenTyper, state: TypeState) -> torch.utils.hooks.RemovableHandle:
    """Make every forward of `decoder` write its tokens' types to `state`; returns the hook's handle."""
    return decoder.register_forward_pre_hook(_TyperHook(typer, state), with_kwargs=True)


def install_typing(
    model: nn.Module, decoder: nn.Module, typer: TokenTyper, state: TypeState
) -> list[torch.utils.hooks.RemovableHandle]:
    """[`install_typer`] on the decoder, and a hook on each module around it that sees ids when it does not.

    A language model hands its arguments on to its decoder as they are; only around others there are hooks.
    """
    handles = [install_typer(decoder, typer, state)]
    base = getattr(model, "base_model", model)
    for name, module in MODULES.get(getattr(getattr(model, "config", None), "model_type", ""), {}).items():
        kind = typer.names.index(name) if name in typer.names else 0
        handles.append(base.get_submodule(module).register_forward_pre_hook(_PartHook(kind, state), with_kwargs=True))
    if decoder in (model, getattr(model, "base_model", None)):
        return handles
    around = [
        module
        for module in model.modules()
        if module is not decoder
        and any(inner is decoder for inner in module.modules())
        and "input_ids" in inspect.signature(module.forward).parameters
    ]
    for index, module in enumerate(around):
        handles.append(module.register_forward_pre_hook(_OuterHook(typer, state, index == 0), with_kwargs=True))
    return handles
