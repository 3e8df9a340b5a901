"""Negative log-likelihood of a text under a causal language model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn


class TextScore(NamedTuple):
    """Mean negative log-likelihood (nats a token), its perplexity, and the number of predicted tokens."""

    nll: float
    perplexity: float
    n_tokens: int


def tokenize_windows(
    text: str, tokenizer: Any, window: int, n_windows: int | None = None, skip: int = 0
) -> torch.Tensor:
    """Non-overlapping windows of token ids, shape `(n_windows, window)`.

    Args:
        text (`str`): The text; tokenized without special tokens.
        window (`int`): Tokens a window.
        n_windows (`int`, *optional*): How many; all that fit by default.
        skip (`int`, *optional*, defaults to 0): Tokens left out at the start.

    Raises:
        `ValueError`: if the text is too short; says how many tokens are needed.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)[skip:]
    needed = window * (n_windows or 1)
    if len(ids) < needed:
        skipped = f" after skipping {skip}" if skip else ""
        raise ValueError(
            f"Evaluation needs {needed} tokens, the text has {len(ids)}{skipped}. Give more text, or ask for fewer tokens or "
            "shorter windows."
        )
    whole = ids[: len(ids) // window * window].view(-1, window)
    return whole if n_windows is None else whole[:n_windows]


@torch.no_grad()
def score_text(model: nn.Module, windows: torch.Tensor, batch_size: int = 1) -> TextScore:
    """Mean NLL of each window's tokens but the first, given those before them in the window.

    The model runs with its KV cache, so a quantized cache counts.

    Args:
        model: A causal language model from transformers.
        windows (`torch.Tensor` of shape `(n, window)`): Token ids.
        batch_size (`int`, *optional*, defaults to 1): Windows a forward.
    """
    device = model.get_input_embeddings().weight.device
    total, count = 0.0, 0
    for ids in windows.split(batch_size):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=True).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + ids[:, 1:].numel()
    return TextScore(total / count, math.exp(min(total / count, 700.0)), count)
