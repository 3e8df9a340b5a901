r"""A transport plan with the evidence that it was solved.

A coupling alone is not a mixing operator: its entries are masses that sum to one. The maps that mix channels are its
barycentric projections, one per direction, and each is normalised by the side it *writes*:

    to target: T = diag(Q 1)⁻¹ Q       (n_target x n_donor), n_target · Q for uniform marginals
    to donor:  R = diag(Qᵀ 1)⁻¹ Qᵀ     (n_donor x n_target), n_donor · Qᵀ for uniform marginals
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class PlanEvidence:
    """What an iterative solver must say about its answer.

    Args:
        solver (`str`): `"assignment"`, `"emd"`, `"entropic"` or `"unbalanced"`.
        reg (`float`): entropic regularisation, 0 for exact solvers.
        cost (`float`): transport cost of the plan.
        marginal_error (`float`): largest relative violation of a row or column sum (0 asks for an exact solver).
        iterations (`int`): iterations used, 0 when the solver does not iterate.
        converged (`bool`): whether the solver met its own stopping rule *and* both marginals hold.
        effective_matches (`float`): perplexity of a row, averaged: 1 for a permutation, `n_donor` for a uniform plan.
    """

    solver: str
    reg: float
    cost: float
    marginal_error: float
    iterations: int
    converged: bool
    effective_matches: float

    def to_dict(self) -> dict:
        """Plain JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class TransportPlan:
    """Coupling of target and donor channels.

    Args:
        coupling (`torch.Tensor` of shape `(n_target, n_donor)`): non-negative masses.
        evidence ([`PlanEvidence`]): how it was obtained.
    """

    coupling: torch.Tensor
    evidence: PlanEvidence

    def __post_init__(self):
        if self.coupling.ndim != 2:
            raise ValueError(f"A coupling is a matrix, got shape {tuple(self.coupling.shape)}.")
        if not torch.isfinite(self.coupling).all() or (self.coupling < 0).any():
            raise ValueError("A coupling holds finite, non-negative masses; this one does not.")

    @property
    def to_target(self) -> torch.Tensor:
        """Row-stochastic map from donor to target channels, `(n_target, n_donor)`; rows without mass stay zero."""
        return _row_normalised(self.coupling)

    @property
    def to_donor(self) -> torch.Tensor:
        """Row-stochastic map from target to donor channels, `(n_donor, n_target)`; rows without mass stay zero."""
        return _row_normalised(self.coupling.T)


def _row_normalised(matrix: torch.Tensor) -> torch.Tensor:
    mass = matrix.sum(dim=1, keepdim=True)
    # A row with less than a millionth of its fair share is unmatched (unbalanced solvers may drop rows).
    floor = 1e-6 * matrix.sum() / max(matrix.shape[0], 1)
    return torch.where(mass > floor, matrix / mass.clamp_min(torch.finfo(matrix.dtype).tiny), 0.0).contiguous()


def effective_matches(coupling: torch.Tensor) -> float:
    """Average perplexity of the row-normalised coupling: how many donor channels one target channel mixes."""
    rows = _row_normalised(coupling)
    entropy = -(rows * rows.clamp_min(torch.finfo(rows.dtype).tiny).log()).sum(dim=1)
    return float(entropy.exp().mean())
