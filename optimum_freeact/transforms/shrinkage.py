"""A weight that reads inputs with noise of their own."""

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
