"""How much better than chance a plan is, on rows it was not fitted on, against a permutation null."""

from __future__ import annotations

import torch

from mergekit_ot.costs import standardise


def matched_correlation(target: torch.Tensor, donor: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
    """Correlation of every target channel with the donor channel it was matched to, `(n_target,)`."""
    return (standardise(target) * standardise(donor)[:, pick]).mean(dim=0)
