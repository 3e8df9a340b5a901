"""Calibration text for diffusion language models: the tokens a masked-diffusion model meets, at every stage of denoising.

Such a model (LLaDA 2502.09992, Dream 2508.15487) is trained and run with a share t of its tokens replaced by [MASK], t
uniform in (0, 1). A calibration text without masks would show it none of the tokens it will have to fill in.
"""

from __future__ import annotations

import torch


def mask_samples(samples: torch.Tensor, mask_id: int, seed: int, least: int = 0) -> torch.Tensor:
    """Replace a share of each row by the mask token; the shares are spread evenly over (0, 1), one per row.

    Args:
        samples (`torch.Tensor` of shape `(n, length)`): Token ids.
        mask_id (`int`): Id of the mask token.
        seed (`int`): Of the shares' order and of the masked places.
        least (`int`, *optional*, defaults to 0): So many tokens are masked at least.

    Returns:
        `torch.Tensor` of shape `(n, length)`. Row by row, exactly `round(t * length)` tokens are masked.
    """
    n, length = samples.shape
    generator = torch.Generator().manual_seed(seed)
    shares = (torch.arange(n) + 0.5) / n
    counts = torch.round(shares[torch.randperm(n, generator=generator)] * length).long().clamp_min(least)
    order = torch.rand(n, length, generator=generator).argsort(1).argsort(1)
    return torch.where(order < counts[:, None], mask_id, samples)


def mask_if_needed(samples: torch.Tensor, rules: dict[str, dict], seed: int) -> torch.Tensor:
    """[`mask_samples`] for a model with a type `"mask"` that is known by one id, if no sample holds it already."""
    ids = rules.get("mask", {}).get("ids", [])
    if len(ids) != 1 or bool((samples == ids[0]).any()):
        return samples
    return mask_samples(samples, ids[0], seed)
