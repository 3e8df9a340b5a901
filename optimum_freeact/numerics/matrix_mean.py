"""Symmetric positive matrices: powers, damping, and the geometric mean of an inverse and a matrix."""

from __future__ import annotations

import torch


def damped(matrix: torch.Tensor, share: float = 1e-3) -> torch.Tensor:
    """Add `share` of the mean diagonal to the diagonal (1e-3: measured on SmolLM2, where 1e-4 and 1e-2 were no better).

    A matrix with a zero diagonal gets the identity, so that the result is always positive definite.
    """
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    amount = torch.where(mean > 0, mean * share, torch.ones_like(mean))
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + amount[..., None, None] * eye


def spd_power(matrix: torch.Tensor, power: float) -> torch.Tensor:
    """`matrix ** power` of a symmetric positive matrix (batched); eigenvalues below 1e-10 of the largest are raised."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values = values.clamp_min((values.amax(-1, keepdim=True) * 1e-10).clamp_min(torch.finfo(values.dtype).tiny))
    return (vectors * values.pow(power).unsqueeze(-2)) @ vectors.mT


def inverse_geometric_mean(c: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    r"""\\( C^{-1} \# H = C^{-1/2} (C^{1/2} H C^{1/2})^{1/2} C^{-1/2} \\), the unique positive G with G C G = H.

    Of all invertible A, those with \\( A A^\top = C^{-1} \# H \\) minimise
    \\( \mathrm{tr}(A^\top C A)\,\mathrm{tr}(A^{-1} H A^{-\top}) \\): the product of activation and weight energy that
    uniform rounding of both sides pays for (the family of WUSH, ICML 2026).

    Args:
        c (`torch.Tensor` of shape `(..., n, n)`): Positive definite second moments of the activations, float64.
        h (`torch.Tensor` of shape `(..., n, n)`): Positive definite second moments of the weights, float64.
    """
    root, inverse_root = spd_power(c, 0.5), spd_power(c, -0.5)
    return inverse_root @ spd_power(root @ h @ root, 0.5) @ inverse_root
