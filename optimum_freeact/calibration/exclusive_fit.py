"""Exclusive subspaces of ours: what a type leaves out is placed by a generalised eigenproblem and sized by measured error.

For each type, the directions in which the other types have much energy and it has next to none: the leading generalised
eigenvectors of (C_others, C_k + damping). Placing them by the largest *difference* of energies instead throws away
directions that still carry some (measured: it destroys a model). Of a few sizes whose left-out output energy stays within a
budget, the one with the least measured output error is taken; leaving out nothing wins ties, and, since rounding to a grid
that holds zero is never worse pointwise than zeroing, wins nearly always.
"""

from __future__ import annotations

import torch

from optimum_freeact.config import FreeActConfig
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.affine import fake_quantize
from optimum_freeact.transforms.affine_map import InputMap
from optimum_freeact.type_rules import SINK


FRACTIONS = (1 / 128, 1 / 64, 1 / 32, 1 / 16)  # of the width
BUDGET = 0.1  # left-out output energy over that of the rounding error
DAMPING = 1e-3  # of C_k, over its mean diagonal
MIN_ROWS = 32


def exclusive_directions(c_own: torch.Tensor, c_others: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal directions `(d, rank)` with the largest ratio of the others' energy to a type's own, strongest first."""
    eye = torch.eye(len(c_own), dtype=c_own.dtype, device=c_own.device)
    # a type whose tokens are all alike (masks, before the first block) has no energy about its mean, or less, by rounding
    least = 1e-6 * c_others.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damping = DAMPING * torch.maximum(c_own.diagonal().mean(), least)
    factor, failed = torch.linalg.cholesky_ex(c_own + damping * eye)
    while failed:  # sums of float32 products may be a little less than positive
        damping = damping * 10
        factor, failed = torch.linalg.cholesky_ex(c_own + damping * eye)
    half = torch.linalg.solve_triangular(factor, c_others, upper=False)
    ratio = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    vectors = torch.linalg.eigh((ratio + ratio.mT) / 2)[1][:, -rank:].flip(1)
    return torch.linalg.qr(torch.linalg.solve_triangular(factor.mT, vectors, upper=True))[0]


def choose_exclusive(
    moments: Moments, found: InputMap, weight: torch.Tensor, config: FreeActConfig
) -> tuple[torch.Tensor | None, list[int]]:
    """What each type leaves out.

    Args:
        moments ([`Moments`]): Of the input, with sample rows.
        found ([`InputMap`]): The map without exclusive subspaces, as it will be used.
        weight (`torch.Tensor` of shape `(out, d)`): That reads the input.
        config ([`FreeActConfig`]): Bits and grid of the activations.

    Returns:
        The directions of all types side by side, `(d, R)`, or `None` if no type leaves out any; and how many are whose.
    """
    sizes, bases = [0] * moments.n_types, []
    kinds = [k for k, name in enumerate(config.token_types) if name != SINK and moments.count[k] >= 2 * len(weight[0])]
    if len(kinds) < 2 or config.activation_bits == 16:
        return None, sizes
    weights, gram = found.transform_weight(weight), weight.mT @ weight
    covariances = {k: moments.covariance(k, _centre(found, k, moments)) for k in kinds}
    rows, types = moments.rows
    width = weight.shape[1]
    for kind in kinds:
        own = rows[types == kind].double()
        if len(own) < MIN_ROWS:
            continue
        others = sum(moments.count[k] * covariances[k] for k in kinds if k != kind)
        others = others / sum(moments.count[k] for k in kinds if k != kind)
        directions = exclusive_directions(covariances[kind], others, max(1, int(width * FRACTIONS[-1])))
        u = own - _centre(found, kind, moments)
        exact = _output(*found.apply_centred(u), weights)
        best = noise = _error(found, u, exact, weights, config)
        for size in (int(width * fraction) for fraction in FRACTIONS):
            basis = directions[:, :size]
            left_out = ((basis.mT @ covariances[kind] @ basis) * (basis.mT @ gram @ basis)).sum()
            if size == 0 or left_out > BUDGET * noise:
                continue
            error = _error(found, u - u @ basis @ basis.mT, exact, weights, config)
            if error < best:
                best, sizes[kind] = error, size
        bases.append(directions[:, : sizes[kind]])
    return (torch.cat(bases, 1), sizes) if any(sizes) else (None, sizes)


def _centre(found: InputMap, kind: int, moments: Moments) -> torch.Tensor:
    if found.mean is None:
        return torch.zeros_like(moments.shift[kind])
    return found.mean[min(kind, len(found.mean) - 1)]


def _error(found: InputMap, kept: torch.Tensor, exact: torch.Tensor, weights: tuple, config: FreeActConfig) -> float:
    """Mean squared output error when only `kept` of a centred input is rounded and carried."""
    z, p = found.apply_centred(kept)
    return float(
        (exact - _output(fake_quantize(z, config.activation_bits, config.activation_symmetric, 1.0), p, weights))
        .square()
        .sum(-1)
        .mean()
    )


def _output(z: torch.Tensor, p: torch.Tensor | None, weights: tuple) -> torch.Tensor:
    v, low_rank = weights
    return z @ v.mT if p is None else z @ v.mT + p @ low_rank.mT
