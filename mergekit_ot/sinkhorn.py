"""Entropic transport in the log domain, in torch, for costs that live on an accelerator.

POT is the default on the CPU; this loop exists because it stays on the device, stops on the relative marginal error
and keeps one matrix of scratch. `tests/merge/test_solvers.py` holds it to POT's answer.
"""

from __future__ import annotations

import torch


def log_sinkhorn(
    cost: torch.Tensor, reg: float, *, max_iterations: int = 2000, tolerance: float = 1e-5, check_every: int = 10
) -> tuple[torch.Tensor, int, float]:
    r"""Minimise \\( \langle C, Q \rangle - \varepsilon H(Q) \\) under uniform marginals (Eq. 8-9 of the paper).

    Args:
        cost (`torch.Tensor` of shape `(n_target, n_donor)`): float32 or float64 cost matrix.
        reg (`float`): entropic regularisation, in units of the cost.
        max_iterations (`int`): sweeps over both marginals.
        tolerance (`float`): relative error of the row sums at which to stop (column sums are exact after a sweep).
        check_every (`int`): sweeps between two checks.

    Returns:
        The coupling `(n_target, n_donor)`, the sweeps used, and the largest relative row error reached.
    """
    n_target, n_donor = cost.shape
    log_a = -torch.log(torch.tensor(float(n_target), dtype=cost.dtype, device=cost.device))
    log_b = -torch.log(torch.tensor(float(n_donor), dtype=cost.dtype, device=cost.device))
    kernel = cost / -reg  # (n_target, n_donor), log of the Gibbs kernel
    f = torch.zeros(n_target, 1, dtype=cost.dtype, device=cost.device)
    g = torch.zeros(1, n_donor, dtype=cost.dtype, device=cost.device)
    error, sweep = float("inf"), 0
    for sweep in range(1, max_iterations + 1):
        f = log_a - torch.logsumexp(kernel + g, dim=1, keepdim=True)
        g = log_b - torch.logsumexp(kernel + f, dim=0, keepdim=True)
        if sweep % check_every == 0 or sweep == max_iterations:
            rows = torch.logsumexp(kernel + g, dim=1, keepdim=True) + f  # log of the row sums
            error = float((torch.expm1(rows - log_a)).abs().max())
            if error < tolerance:
                break
    return (kernel + f + g).exp_(), sweep, error
