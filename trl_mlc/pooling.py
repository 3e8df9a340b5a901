"""From token states to one vector per prompt; correct for left and for right padding."""

from __future__ import annotations

from collections.abc import Callable

import torch


def last_token_pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """State of the last real token: where the model is about to answer (the paper's choice).

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, d)`): any dtype.
        attention_mask (`torch.Tensor` of shape `(B, T)`): 1 for real tokens, padding on either side.

    Returns:
        `torch.Tensor` of shape `(B, d)`, same dtype.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask.ne(0)).argmax(1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


def mean_pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean state of the real tokens, summed in float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, d)`): any floating dtype.
        attention_mask (`torch.Tensor` of shape `(B, T)`): 1 for real tokens, padding on either side.

    Returns:
        `torch.Tensor` of shape `(B, d)`, same dtype.
    """
    dtype = hidden_states.dtype if hidden_states.dtype == torch.float64 else torch.float32
    weights = attention_mask.ne(0).unsqueeze(-1).to(dtype)
    total = (hidden_states.to(dtype) * weights).sum(1)
    return (total / weights.sum(1).clamp_min(1)).to(hidden_states.dtype)


POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "last": last_token_pool,
    "mean": mean_pool,
}
