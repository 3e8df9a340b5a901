"""How well a model predicts windows of a text: many tokens a forward, the head a part of them at a time.

A forward is a long chain of small kernels, which many tokens share, so several windows go through the decoder together;
logits of a large vocabulary are made for one window's worth of tokens at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn


TOKENS = 8192  # of a forward
HEAD_TOKENS = 1024  # whose logits are there at a time


class Score(NamedTuple):
    """Mean negative log-likelihood of all tokens but each window's first, and the divergence KL(exact || model) where asked."""

    nll: float
    n_tokens: int
    divergence: float | None


@torch.no_grad()
def hidden_states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the head reads, `(B, T, H)`; the model runs whole and with its cache, so that a quantized cache counts."""
    kept: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda *called: kept.append(called[-1][0]))
    try:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()
    return kept[0]


def _log_probabilities(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """In float32; the models measured here have a plain head (a test compares with what they return)."""
    return model.get_output_embeddings()(hidden).float().log_softmax(-1)


@torch.no_grad()
def score_windows(model: nn.Module, windows: torch.Tensor, exact: nn.Module | None = None) -> Score:
    """Scores over `windows` of token ids, `(n, window)`, means over tokens; against `exact` where it is given."""
    device = model.get_input_embeddings().weight.device
    length = windows.shape[1]
    lost, apart = 0.0, 0.0
    for some in windows.split(max(1, TOKENS // length)):
        ids = some.to(device)
        found = hidden_states(model, ids).flatten(0, 1).split(HEAD_TOKENS)
        wanted = [None] * len(found) if exact is None else hidden_states(exact, ids).flatten(0, 1).split(HEAD_TOKENS)
        following = torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -100)), 1)  # a window's last predicts nothing
        for part, other, targets in zip(found, wanted, following.flatten().split(HEAD_TOKENS), strict=True):
            told = _log_probabilities(model, part)
            lost += float(nn.functional.nll_loss(told, targets, ignore_index=-100, reduction="sum"))
            if other is not None:
                truth = _log_probabilities(exact, other)
                apart += float(nn.functional.kl_div(told, truth, reduction="sum", log_target=True))
    count = windows.numel() - len(windows)
    return Score(lost / count, count, None if exact is None else apart / windows.numel())


def is_finite(score: Score) -> bool:
    """Whether the likelihood is a number."""
    return math.isfinite(score.nll)
