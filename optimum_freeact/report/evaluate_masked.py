"""How well a masked-diffusion language model knows a text: a bound of its negative log-likelihood.

Such a model gives no text a probability in closed form. What it is trained on bounds it: hide l of a window's L tokens, l uniform
in 1 ... L, and take L/l times the loss at the hidden ones (LLaDA, 2502.09992, Eq. 6; over L tokens, the mean loss at a hidden one).
Windows get every share of hidden tokens in turn, and the same ones for every model, so that models differ by what they are.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from optimum_freeact.calibration.masking import mask_samples
from optimum_freeact.models.denoise import mask_of, predictions
from optimum_freeact.report.evaluate import TextScore


def hide_tokens(windows: torch.Tensor, mask_id: int, seed: int = 0) -> torch.Tensor:
    """Windows `(n, length)` with a share of each hidden behind `mask_id`, never its first token and at least one ([`mask_samples`])."""
    return torch.cat((windows[:, :1], mask_samples(windows[:, 1:], mask_id, seed, least=1)), 1)


@torch.no_grad()
def score_masked(model: nn.Module, windows: torch.Tensor, hidden: torch.Tensor) -> TextScore:
    """The bound, in nats a token; its exponential bounds the perplexity.

    The model runs with its KV cache, so a quantized cache counts.

    Args:
        model: A masked-diffusion model whose config has `mask_token_id` (and `shifted_logits` where they are).
        windows (`torch.Tensor` of shape `(n, length)`): Token ids; run one at a time.
        hidden (`torch.Tensor` of shape `(n, length)`): The same after [`hide_tokens`].

    Raises:
        `ValueError`: if the model has no mask token.
    """
    mask_id, shifted = mask_of(model)
    device, total = model.get_input_embeddings().weight.device, 0.0
    for ids, given in zip(windows.to(device), hidden.to(device), strict=True):
        there = given == mask_id
        logits = predictions(model(input_ids=given[None], use_cache=True).logits, None, shifted)[0, there]
        total += float(nn.functional.cross_entropy(logits.float(), ids[there]))
    nll = total / len(windows)
    return TextScore(nll, math.exp(min(nll, 700.0)), windows[:, 1:].numel())
