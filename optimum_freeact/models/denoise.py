"""Text from a masked-diffusion language model: all places start as [MASK], the surest are filled in first.

Low-confidence remasking as in LLaDA (2502.09992, Alg. 5), optionally block by block with the finished text in the KV
cache: then a token changes from masked to unmasked within a block, and every pass of a block is computed anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from optimum_freeact.cache_name import NAMES, cache_name
from optimum_freeact.type_rules import ID_FIELDS, field_value, sub_configs


def predictions(logits: torch.Tensor, before: torch.Tensor | None, shifted: bool) -> torch.Tensor:
    """Logits of each position's own token.

    Args:
        logits (`torch.Tensor` of shape `(batch, tokens, vocabulary)`): As the model gives them.
        before (`torch.Tensor` of shape `(batch, 1, vocabulary)`, *optional*): Logits at the last cached position.
        shifted (`bool`): Whether the model's logits are those of the next token (Dream).
    """
    if not shifted:
        return logits
    first = logits[:, :1] if before is None else before
    return torch.cat((first, logits[:, :-1]), 1)


def mask_of(model: nn.Module) -> tuple[int, bool]:
    """Id of a model's mask token, and whether its logits are those of the next token.

    Raises:
        `ValueError`: if the model has no mask token.
    """
    mask_id = field_value(model.config, "mask_token_id")
    if mask_id is None:
        raise ValueError(f"{type(model).__name__}'s config has no mask_token_id: it is no masked-diffusion model.")
    return mask_id, any(getattr(config, "shifted_logits", False) for config in sub_configs(model.config))


@torch.no_grad()
def denoise(
    model: nn.Module,
    prompt: torch.Tensor,
    new_tokens: int,
    steps: int,
    *,
    block: int | None = None,
    use_cache: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    **arguments: Any,
) -> torch.Tensor:
    """Continue a prompt by denoising.

    Args:
        model: A masked-diffusion model whose config has `mask_token_id` (and `shifted_logits` where they are).
        prompt (`torch.Tensor` of shape `(batch, tokens)`): Token ids without padding.
        new_tokens, steps (`int`): How many tokens in how many passes.
        block (`int`, *optional*): Fill blocks of so many tokens from left to right; all at once by default.
        use_cache (`bool`, *optional*, defaults to `False`): Keep what lies before the current block in a cache. The
            cached tokens then do not see the block, as in block diffusion.
        temperature (`float`, *optional*, defaults to 0): Of the Gumbel noise on the choice of tokens.
        seed (`int`, *optional*, defaults to 0): Of that noise.
        **arguments: Further arguments of the first pass over the prompt (pixel values, ...).

    Returns:
        `torch.Tensor` of shape `(batch, tokens + new_tokens)`.

    Raises:
        `ValueError`: if the model has no mask token, or the numbers do not divide.
    """
    mask_id, shifted = mask_of(model)
    told_ids = (field_value(model.config, field) for fields in ID_FIELDS.values() for field in fields)
    never = sorted({i for i in told_ids if i is not None})  # a place for a picture stands for one that was given
    block = block or new_tokens
    if new_tokens % block or steps % (new_tokens // block) or steps > new_tokens:
        raise ValueError(
            f"new_tokens={new_tokens} must be a multiple of block={block}, and steps={steps} one of the "
            f"{new_tokens // block} blocks and at most new_tokens."
        )
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    per_block = steps // (new_tokens // block)
    tail = prompt.new_full((len(prompt), new_tokens), mask_id)
    ids, cache, cached, before = torch.cat((prompt, tail), 1), DynamicCache(config=model.config), 0, None
    with_cache = {cache_name(model) or NAMES[0]: cache, "use_cache": True}
    for start in range(prompt.shape[1], ids.shape[1], block):
        stop = start + block
        if use_cache and start > cached:
            told = model(input_ids=ids[:, cached:start], **with_cache, **arguments)
            before, cached, arguments = told.logits[:, -1:], start, {}
        for step in range(per_block):
            if use_cache:
                told = model(input_ids=ids[:, start:stop], **with_cache)
                cache.crop(start - stop)  # negative: how many tokens to forget
                logits = predictions(told.logits, before, shifted)
            else:
                told = model(input_ids=ids, use_cache=False, **arguments)
                logits = predictions(told.logits, None, shifted)[:, start:stop]
            ids[:, start:stop] = fill(
                ids[:, start:stop], logits, mask_id, per_block - step, temperature, generator, never
            )
    return ids


def fill(
    ids: torch.Tensor,
    logits: torch.Tensor,
    mask_id: int,
    passes_left: int,
    temperature: float,
    generator: torch.Generator,
    never: list[int] | None = None,
) -> torch.Tensor:
    """Fill in the surest of the masked places, so many that the rest suffices for the passes that are left.

    Args:
        ids (`torch.Tensor` of shape `(batch, tokens)`): Current ids.
        logits (`torch.Tensor` of shape `(batch, tokens, vocabulary)`): Of each position's own token.
        never (`list[int]`, *optional*): Ids that are not written, besides the mask.
    """
    kept_out = torch.tensor([mask_id, *(never or [])], device=logits.device)
    logits = logits.float().index_fill(-1, kept_out, -torch.inf)
    noisy = logits
    if temperature > 0:
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_min(1e-9)
        noisy = logits - temperature * (-uniform.log()).log()
    chosen = noisy.argmax(-1)
    sure = logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]
    masked = ids == mask_id
    sure = sure.masked_fill(~masked, -1.0)
    count = (masked.sum(1) + passes_left - 1) // passes_left
    rank = sure.argsort(1, descending=True).argsort(1)
    return torch.where(masked & (rank < count[:, None]), chosen, ids)
