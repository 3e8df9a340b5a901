"""Calibrating a block-diffusion model of two stacks that share their tensors (DiffusionGemma), as one chain of blocks.

Its encoder reads the prompt and leaves keys and values, its decoder reads them and refines a canvas of tokens. A block of the one
and the block of the other at the same depth hold the same weights and differ in what their tokens see. So one pass of the
decoder's blocks over prompt and canvas together, with a mask that shows each token what it would see, computes both exactly, and
every linear is met once, by the tokens of both. Types: the canvas is one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.layout import find_decoder
from optimum_freeact.modules.twins import find_encoder
from optimum_freeact.token_types import TokenTyper
from optimum_freeact.type_rules import CANVAS
from optimum_freeact.type_state import TypeState


def check_canvas(model: nn.Module, config: FreeActConfig, samples: torch.Tensor | list[dict]) -> None:
    """Refuse what is not built for such a model.

    Raises:
        `ValueError`: naming the setting.
    """
    name = type(model).__name__
    if model.config.text_config.use_bidirectional_attention == "all":
        raise ValueError(f"use_bidirectional_attention='all': the encoder of {name} is taken to look back only.")
    if not isinstance(samples, torch.Tensor):
        raise ValueError(f"{name} is calibrated on text: give texts or token ids as dataset, no prepared inputs.")
    if config.kv_bits < 16:
        raise ValueError(
            f"kv_bits={config.kv_bits}: the decoder of {name} reads the cache's tensors itself; use kv_bits=16."
        )
    if config.discovered_types:
        raise ValueError(f"discovered_types={config.discovered_types} is not built for {name}: leave it out.")


def canvas_length(model: nn.Module, length: int) -> int:
    """How many tokens at the end of a sample are canvas: the model's own number, but no more than half."""
    return max(1, min(model.config.canvas_length, length // 2))


def with_noise(model: nn.Module, samples: torch.Tensor, seed: int) -> torch.Tensor:
    """Samples whose canvas is as the model meets it: a share of its tokens drawn at random, the shares spread evenly over (0, 1).

    It has no mask token, and begins with a canvas of random ones.
    """
    n, canvas = len(samples), canvas_length(model, samples.shape[1])
    vocab_size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    shares = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=generator)]
    chosen = torch.rand(n, canvas, generator=generator) < shares[:, None]
    drawn = torch.randint(vocab_size, (n, canvas), generator=generator)
    found = samples.clone()
    found[:, -canvas:] = torch.where(chosen, drawn, samples[:, -canvas:])
    return found


def joint_mask(length: int, canvas: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """What each token sees, as numbers to add to attention scores, `(1, 1, length, length)`.

    Args:
        length, canvas (`int`): Of all tokens, the last ones are canvas.
        window (`int`, *optional*): Of a block with sliding attention: a prompt's token sees so many, itself included; the
            canvas what the cache keeps of the prompt, one less.
        like (`torch.Tensor`): Gives type and device.
    """
    i, j = (torch.arange(length, device=like.device).view(shape) for shape in ((-1, 1), (1, -1)))
    prompt = length - canvas
    sees = j <= i
    kept = torch.ones_like(sees)
    if window is not None:
        sees = sees & (i - j < window)
        kept = j > prompt - window
    sees = torch.where(i < prompt, sees & (j < prompt), kept | (j >= prompt))
    return torch.zeros_like(sees, dtype=like.dtype).masked_fill(~sees, torch.finfo(like.dtype).min)[None, None]


@contextmanager
def one_chain(
    model: nn.Module, samples: torch.Tensor | list[dict], typer: TokenTyper, state: TypeState
) -> Iterator[None]:
    """Inside, `model(input_ids)` of a model with two stacks is the pass over prompt and canvas together, for ids of the
    samples' length; other models are as they are.
    """
    encoder, decoder = find_encoder(model), find_decoder(model)
    if encoder is None:
        yield
        return
    assert isinstance(samples, torch.Tensor)
    length = samples.shape[1]
    canvas = canvas_length(model, length)
    settings = model.config.text_config
    kind = typer.names.index(CANVAS) if CANVAS in typer.names else 0

    def forward(input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:  # noqa: ARG001
        prompt, drawn = input_ids[:, :-canvas], input_ids[:, -canvas:]
        positions = torch.arange(length, device=input_ids.device)[None]
        first = decoder.embed_tokens(drawn)
        hidden = torch.cat(
            (encoder.embed_tokens(prompt), decoder.self_conditioning(first, torch.zeros_like(first))), 1
        )
        state.take()
        types = typer({"input_ids": prompt, "position_ids": positions[:, :-canvas]})
        state.types = None
        if types is not None:
            state.types = torch.cat((types, torch.full_like(drawn, kind)), 1)
        windows = {"full_attention": None, "sliding_attention": settings.sliding_window}
        masks = {name: joint_mask(length, canvas, window, hidden) for name, window in windows.items()}
        turned = {name: decoder.rotary_emb(hidden, positions, name) for name in set(settings.layer_types)}
        for layer, name in zip(decoder.layers, settings.layer_types):
            hidden = layer(
                hidden,
                position_embeddings=turned[name],
                attention_mask=masks[name],
                position_ids=positions,
                cache=None,
            )
        return decoder.norm(hidden)

    own = [layer.layer_scalar for layer in decoder.layers]  # the one part that is not tied
    for layer, twin in zip(decoder.layers, encoder.layers, strict=True):
        scalars = (twin.layer_scalar.expand(length - canvas), layer.layer_scalar.expand(canvas))
        layer.layer_scalar = torch.cat(scalars).view(1, length, 1)
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        for layer, scalar in zip(decoder.layers, own):
            layer.layer_scalar = scalar.to(layer.layer_scalar.device)
