"""Texts that a donor writes: it goes on from the first tokens of the user's own, so that it can teach more than there is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch


@torch.no_grad()
def continuations(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    new_tokens: int = 128,
    choices: int = 64,
    temperature: float = 0.8,
    together: int = 64,
    seed: int = 0,
) -> list[list[int]]:
    """Sample continuations of prompts.

    Args:
        model (`PreTrainedModel`): causal language model in eval mode.
        prompts (`Sequence[Sequence[int]]`): token ids; those shorter than the longest are left out, since texts are read side
            by side without padding.
        samples (`int`, *optional*, defaults to 1): continuations of each prompt.
        new_tokens (`int`, *optional*, defaults to 128): tokens added at most.
        choices (`int`, *optional*, defaults to 64): likeliest next tokens that are drawn from.
        temperature (`float`, *optional*, defaults to 0.8): of the draw.
        together (`int`, *optional*, defaults to 64): texts written side by side.
        seed (`int`, *optional*, defaults to 0): of the draw.

    Returns:
        `list[list[int]]`: token ids with their prompt, cut where the model ends a text; prompts in order.
    """
    device, texts = next(model.parameters()).device, []
    draw = torch.Generator(device).manual_seed(seed)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    # newer versions of transformers call it so in arguments and outputs
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    longest = max((len(prompt) for prompt in prompts), default=0)
    kept = [list(prompt) for prompt in prompts if len(prompt) == longest]
    if not longest:
        return []
    for ids in torch.tensor(kept, device=device).repeat_interleave(samples, dim=0).split(together):
        step, cache = ids, None
        for _ in range(new_tokens):
            output = model(input_ids=step, use_cache=True, logits_to_keep=1, **{name: cache})
            cache = getattr(output, name)
            likeliest = output.logits[:, -1].float().topk(min(choices, output.logits.shape[-1]))
            chosen = torch.multinomial((likeliest.values / temperature).softmax(-1), 1, generator=draw)
            step = likeliest.indices.gather(-1, chosen)
            ids = torch.cat([ids, step], dim=-1)
        for row in ids.tolist():
            texts.append(row[: next((i for i in range(longest, len(row)) if row[i] in ends), len(row))])
    return texts
