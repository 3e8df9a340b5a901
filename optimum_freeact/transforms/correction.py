r"""Weights that undo, as far as a linear map can, the errors that earlier quantized layers left in the input.

With x the input in the quantized model and y the same token's input in the full-precision model, the weight that
minimises \\( E\,\|W y - W' x\|^2 \\) is \\( W' = W\, E[y^\top x]\, E[x^\top x]^{-1} \\) (all centred). It is applied
in the rounded coordinates, where the rounding noise of the activations themselves is added to E[x^T x]: that noise is
also what keeps the inverse well conditioned.
"""

from __future__ import annotations

import torch


def shrunk_weight(weight: torch.Tensor, moments: torch.Tensor, noise: torch.Tensor | float) -> torch.Tensor:
    r"""The weight that predicts `x W^T` best from x plus noise of its own: \\( W M (M + \sigma^2 I)^{-1} \\) (Wiener).

    Directions in which an input has less energy than its rounding noise carry more noise than signal, above all those that
    the high-precision branch has taken out and that x does not have at all.

    Args:
        weight (`torch.Tensor` of shape `(out, d)`): In the coordinates that are rounded.
        moments (`torch.Tensor` of shape `(d, d)`): M = E[x^T x] in the same coordinates, float64.
        noise (`torch.Tensor` or `float`): Variance of each coordinate's rounding error; 0 leaves the weight as it is.

    Returns:
        `torch.Tensor` of shape `(out, d)`, float64.
    """
    if not noise > 0:
        return weight.double()
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor, failed = torch.linalg.cholesky_ex(moments + noise * eye)
    if failed:  # moments that are not quite positive: less noise than digits
        return weight.double()
    return weight.double() - noise * torch.cholesky_solve(weight.double().mT, factor).mT


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
