"""Transport plans from cost matrices. The one file that knows POT.

Hard plans are exact: the assignment problem when the widths agree, the network simplex otherwise. Every answer carries
its evidence, and an answer that did not converge is an error unless it is asked for.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from mergekit_ot.plan import PlanEvidence, TransportPlan, effective_matches
from mergekit_ot.sinkhorn import log_sinkhorn


if TYPE_CHECKING:
    import numpy as np

SOLVERS = ("hard", "entropic", "unbalanced")
#: Regularisations tried by `auto_reg`, from the softest to the hardest that float32 log-domain sweeps solve reliably.
REG_LADDER = (0.1, 0.05, 0.03, 0.02, 0.01)
#: Entries of a rectangular problem that scipy solves in a fraction of a second.
LINEAR_PROGRAMME_LIMIT = 20_000
#: A marginal may be off by this relative amount before a plan counts as not converged.
MARGINAL_TOLERANCE = 1e-3


class NotConvergedError(RuntimeError):
    """A solver stopped before its marginals held; the message says how far off and what to turn."""


def solve_plan(
    cost: torch.Tensor,
    *,
    solver: str = "hard",
    reg: float = 0.03,
    marginal_penalty: float = 1.0,
    max_iterations: int = 2000,
    allow_not_converged: bool = False,
    name: str = "plan",
) -> TransportPlan:
    r"""Couple target and donor channels at least cost, with uniform marginals (Eq. 8-9 of the paper).

    Args:
        cost (`torch.Tensor` of shape `(n_target, n_donor)`): cost matrix, any floating dtype, any device.
        solver (`str`): `"hard"` (exact), `"entropic"` or `"unbalanced"` (marginals kept by a KL penalty).
        reg (`float`, *optional*, defaults to 0.03): entropic regularisation; ignored by `"hard"`.
        marginal_penalty (`float`, *optional*, defaults to 1.0): KL weight of the marginals, `"unbalanced"` only.
        max_iterations (`int`, *optional*, defaults to 2000): sweeps of the iterative solvers.
        allow_not_converged (`bool`, *optional*, defaults to `False`): return such a plan instead of raising.
        name (`str`): what is being matched, for messages.

    Returns:
        [`TransportPlan`] in the cost's dtype (at least float32) and device.

    Raises:
        `ValueError`: for an unknown solver, a non-finite cost or a non-positive `reg`.
        [`NotConvergedError`]: when the marginals do not hold after `max_iterations`.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}.")
    if cost.ndim != 2 or 0 in cost.shape:
        raise ValueError(f"{name}: a cost is a non-empty matrix, got shape {tuple(cost.shape)}.")
    if not torch.isfinite(cost).all():
        raise ValueError(f"{name}: the cost matrix is not finite; look for non-finite activations.")
    if solver != "hard" and not (math.isfinite(reg) and reg > 0):
        raise ValueError(f"{name}: reg must be a positive number, got {reg!r}.")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    if solver == "hard":
        coupling, kind, iterations, ok = _hard(cost)
        reg = 0.0
    elif solver == "entropic":
        coupling, kind, iterations, ok = _entropic(cost, reg, max_iterations)
    else:
        coupling, kind, iterations, ok = _unbalanced(cost, reg, marginal_penalty, max_iterations)
    error = float("nan") if solver == "unbalanced" else marginal_error(coupling)
    converged = ok and (solver == "unbalanced" or error <= MARGINAL_TOLERANCE)
    if not converged and not allow_not_converged:
        raise NotConvergedError(
            f"{name}: the {kind} solver did not converge in {iterations} iterations at reg={reg} "
            f"(relative marginal error {error:.2g}, at most {MARGINAL_TOLERANCE} allowed); raise reg, or use solver: hard."
        )
    evidence = PlanEvidence(
        kind, reg, float((cost * coupling).sum()), error, iterations, converged, effective_matches(coupling)
    )
    return TransportPlan(coupling, evidence)


def marginal_error(coupling: torch.Tensor) -> float:
    """Largest relative violation of the uniform row and column sums."""
    rows = (coupling.sum(dim=1) * coupling.shape[0] - 1.0).abs().max()
    columns = (coupling.sum(dim=0) * coupling.shape[1] - 1.0).abs().max()
    return float(torch.maximum(rows, columns))


def auto_reg(self_similarity: torch.Tensor, *, mass: float = 0.99) -> float:
    """Largest regularisation at which matching a model with itself still finds itself.

    Args:
        self_similarity (`torch.Tensor` of shape `(n, n)`): correlation of the target's channels with each other.
        mass (`float`, *optional*, defaults to 0.99): share of each channel's mass that must stay on the channel.

    Returns:
        `float`: a value of `REG_LADDER`; the smallest one when none keeps the mass.
    """
    cost = 1.0 - self_similarity
    for reg in REG_LADDER[:-1]:
        coupling, _, _ = log_sinkhorn(cost, reg, max_iterations=200, tolerance=1e-3)
        if float(coupling.diagonal().sum()) >= mass:
            return reg
    return REG_LADDER[-1]


def _hard(cost: torch.Tensor) -> tuple[torch.Tensor, str, int, bool]:
    import numpy as np

    n_target, n_donor = cost.shape
    matrix = cost.detach().cpu().double().numpy()
    if n_target == n_donor:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(matrix)
        coupling = np.zeros_like(matrix)
        coupling[rows, columns] = 1.0 / n_target
        return torch.from_numpy(coupling).to(cost), "assignment", 0, True
    if not has_pot():
        return torch.from_numpy(_linear_programme(matrix)).to(cost), "linear programme", 0, True
    import ot

    limit = 100 * (n_target + n_donor) ** 2
    coupling, log = ot.emd(ot.unif(n_target), ot.unif(n_donor), matrix, numItermax=limit, log=True)
    return torch.from_numpy(coupling).to(cost), "emd", 0, log["warning"] is None


def has_pot() -> bool:
    """Whether POT is installed. Without it small plans go through scipy and entropic ones through `sinkhorn`."""
    return find_spec("ot") is not None


def _linear_programme(cost: np.ndarray) -> np.ndarray:
    """Exact plan of a small rectangular problem by scipy's linear programming."""
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    n_target, n_donor = cost.shape
    if cost.size > LINEAR_PROGRAMME_LIMIT:
        raise ModuleNotFoundError(
            f"An exact plan of {n_target} x {n_donor} needs POT (`pip install POT`); without it use solver: entropic."
        )
    entry = np.arange(cost.size)
    rows = np.concatenate([entry // n_donor, n_target + entry % n_donor])
    constraints = coo_array((np.ones(2 * cost.size), (rows, np.concatenate([entry, entry]))))
    marginals = np.concatenate([np.full(n_target, 1 / n_target), np.full(n_donor, 1 / n_donor)])
    solution = linprog(cost.ravel(), A_eq=constraints.tocsr(), b_eq=marginals, method="highs")
    return np.maximum(solution.x, 0.0).reshape(cost.shape)


def _entropic(cost: torch.Tensor, reg: float, max_iterations: int) -> tuple[torch.Tensor, str, int, bool]:
    if cost.is_cuda or not has_pot():
        coupling, iterations, error = log_sinkhorn(cost, reg, max_iterations=max_iterations)
        return coupling, "entropic", iterations, error <= MARGINAL_TOLERANCE
    import ot

    coupling, log = ot.sinkhorn(
        ot.unif(cost.shape[0], type_as=cost),
        ot.unif(cost.shape[1], type_as=cost),
        cost,
        reg,
        method="sinkhorn_log",
        numItermax=max_iterations,
        stopThr=1e-6,
        log=True,
        warn=False,
    )
    return coupling, "entropic", int(log["niter"]) + 1, True


def _unbalanced(
    cost: torch.Tensor, reg: float, penalty: float, max_iterations: int
) -> tuple[torch.Tensor, str, int, bool]:
    import ot

    n_target, n_donor = cost.shape
    coupling, log = ot.unbalanced.sinkhorn_unbalanced(
        ot.unif(n_target, type_as=cost),
        ot.unif(n_donor, type_as=cost),
        cost,
        reg,
        penalty,
        method="sinkhorn_stabilized",
        numItermax=max_iterations,
        stopThr=1e-6,
        log=True,
    )
    errors = log["err"]
    return coupling, "unbalanced", 10 * len(errors), bool(len(errors)) and float(errors[-1]) <= 1e-3
