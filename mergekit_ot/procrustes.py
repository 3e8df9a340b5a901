"""Orthogonal maps between spaces of different width, and the rule that prefers the simplest map that explains the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


#: A simpler map is preferred while it explains at least this much held-out variance ...
SIMPLE_FLOOR = 0.5
#: ... and at most this much less than the best one. A fine-tuned relative moves by less; another basis by far more.
SIMPLE_SLACK = 0.25


@dataclass(frozen=True)
class MapPair:
    """The two directions between a donor space and a target space.

    Args:
        kind (`str`): how the maps were made, e.g. `"ot"` or `"procrustes"`.
        to_target (`torch.Tensor` of shape `(n_target, n_donor)`): donor to target.
        to_donor (`torch.Tensor` of shape `(n_donor, n_target)`): target to donor.
    """

    kind: str
    to_target: torch.Tensor
    to_donor: torch.Tensor

    @property
    def directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both maps."""
        return self.to_target, self.to_donor


def two_scale_procrustes(
    cross: torch.Tensor, target: torch.Tensor, donor: torch.Tensor, *, keep_size: bool = False
) -> MapPair:
    r"""Fit one orthogonal map and a least-squares scale per direction.

    With \\( C = U S V^\top \\) the cross moment and \\( M = U V^\top \\), returns \\( T = t M \\) and
    \\( R = r M^\top \\), where t and r minimise \\( \|X_A - t X_B M^\top\| \\) and \\( \|X_B - r X_A M\| \\). Two
    scales are needed as soon as the widths differ: a donor that holds every channel twice has t = 1/√2, r = √2.

    Args:
        cross (`torch.Tensor` of shape `(n_target, n_donor)`): \\( X_A^\top X_B \\).
        target (`torch.Tensor` of shape `(n_target, n_target)`): \\( X_A^\top X_A \\).
        donor (`torch.Tensor` of shape `(n_donor, n_donor)`): \\( X_B^\top X_B \\).
        keep_size (`bool`, *optional*, defaults to `False`): choose scales that keep the rows' size instead. Least
            squares shrinks by the noise, which is right for prediction and wrong for translating a relative.

    Returns:
        [`MapPair`] in the dtype of `cross`.
    """
    u, _, vh = torch.linalg.svd(cross, full_matrices=False)
    matrix = u @ vh  # (n_target, n_donor)
    tiny = torch.finfo(cross.dtype).tiny
    agreement = (matrix * cross).sum()
    donor_size = ((matrix @ donor) * matrix).sum().clamp_min(tiny)
    target_size = ((target @ matrix) * matrix).sum().clamp_min(tiny)
    to_target, to_donor = agreement / donor_size, agreement / target_size
    if keep_size:
        to_target, to_donor = (target.trace() / donor_size).sqrt(), (donor.trace() / target_size).sqrt()
    return MapPair("procrustes", to_target * matrix, to_donor * matrix.T)


def explained(rows: torch.Tensor, predicted: torch.Tensor) -> float:
    """Share of the rows' variance that a prediction explains (R²), means taken out of both; may be negative."""
    centred = rows - rows.mean(dim=0, keepdim=True)
    error = centred - (predicted - predicted.mean(dim=0, keepdim=True))
    total = centred.square().sum()
    return float(1.0 - error.square().sum() / total) if total > 0 else 0.0


def explained_both_ways(pair: MapPair, target: torch.Tensor, donor: torch.Tensor) -> float:
    """Mean R² of predicting the target rows from the donor's and the donor rows from the target's."""
    forward = explained(target, donor @ pair.to_target.to(donor).T)
    backward = explained(donor, target @ pair.to_donor.to(target).T)
    return (forward + backward) / 2


def simplest(scores: Sequence[float]) -> int:
    """Index of the first score that is good enough, or of the best one.

    Candidates are given from the simplest to the most flexible. Flexible maps absorb part of what fine-tuning changed,
    so the best score alone would prefer them even where the simple relation is the true one.
    """
    best = max(scores)
    for i, score in enumerate(scores):
        if score >= max(SIMPLE_FLOOR, best - SIMPLE_SLACK):
            return i
    return list(scores).index(best)
