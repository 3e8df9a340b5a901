r"""Weights that undo, as far as a linear map can, the errors that earlier quantized layers left in the input.

With x the input in the quantized model and y the same token's input in the full-precision model, the weight that
minimises \\( E\,\|W y - W' x\|^2 \\) is \\( W' = W\, E[y^\top x]\, E[x^\top x]^{-1} \\) (all centred). It is applied
in the rounded coordinates, where the rounding noise of the activations themselves is added to E[x^T x]: that noise is
also what keeps the inverse well conditioned.
"""

from __future__ import annotations

import torch


def corrected_weight(
    weight: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor, strength: float = 1.0
) -> torch.Tensor:
    """`weight @ (I + strength * (cross - moments) moments^-1)`.

    Args:
        weight (`torch.Tensor` of shape `(out, d)`): Weight in the coordinates of the moments.
        moments (`torch.Tensor` of shape `(d, d)`): E[x^T x] plus noise and damping, float64, positive definite.
        cross (`torch.Tensor` of shape `(d, d)`): E[y^T x], plus the same damping (not the noise).
        strength (`float`, *optional*, defaults to 1.0): 1 is the least-squares solution, 0 leaves the weight.
    """
    factor = torch.linalg.cholesky(moments)
    change = torch.cholesky_solve((weight.double() @ (cross - moments)).mT, factor).mT
    return weight.double() + strength * change
