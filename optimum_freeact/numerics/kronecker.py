"""Kronecker products applied without forming them."""

from __future__ import annotations

import math

import torch


def factor_pair(n: int) -> tuple[int, int]:
    """The divisors `(a, b)`, `a <= b`, `a * b = n`, nearest to the square root; `(1, n)` for a prime.

    FlatQuant searches pairs with a square difference, which equals this for even splits and never ends when
    `n = 2 (mod 4)`.
    """
    if n < 1:
        raise ValueError(f"factor_pair needs a positive size, got {n}.")
    a = math.isqrt(n)
    while n % a:
        a -= 1
    return a, n // a


def kron_apply(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    r"""\\( x (L \otimes R) \\) as two small products.

    Args:
        x (`torch.Tensor` of shape `(..., a * b)`): Rows.
        left (`torch.Tensor` of shape `(a, a)`): Acts on the slow index.
        right (`torch.Tensor` of shape `(b, b)`): Acts on the fast index.

    Returns:
        `torch.Tensor` of the shape of `x`. Equals `x @ torch.kron(left, right)` (tested in float64).
    """
    a, b = left.shape[0], right.shape[0]
    tiles = x.unflatten(-1, (a, b)) @ right
    return (tiles.mT @ left).mT.flatten(-2)  # matrices on the right: one large product each, not one per row


def partial_traces(
    matrix: torch.Tensor, left_metric: torch.Tensor, right_metric: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""The two partial traces of a matrix on a product space, each weighted by the other factor's metric.

    For \\( M \\) of shape `(ab, ab)` returns \\( \mathrm{Tr}_b[M (I \otimes G_b)] \\) of shape `(a, a)` and
    \\( \mathrm{Tr}_a[M (G_a \otimes I)] \\) of shape `(b, b)`.
    """
    a, b = left_metric.shape[0], right_metric.shape[0]
    four = matrix.reshape(a, b, a, b)
    return torch.einsum("ibjd,db->ij", four, right_metric), torch.einsum("ibjd,ji->bd", four, left_metric)
