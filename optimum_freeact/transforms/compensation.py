r"""Undo what quantized queries, keys and values do to the attention's output, before the next linear reads it.

The idea is STaR-Quant's (2606.04945): a block-diagonal affine map that gives the attention output x of the quantized layer
the first and second moments that the full-precision output y of the same tokens has. In closed form, per block of
channels, with covariances S_x and S_y,

    T = S_x^{-1} # S_y = S_x^{-1/2} (S_x^{1/2} S_y S_x^{1/2})^{1/2} S_x^{-1/2},        T S_x T = S_y,

the optimal transport between two Gaussians. Unlike a least-squares fit it does not shrink what the noise blurs: the second
moments stay those of the full-precision model. Ours has a mean per token type, and costs nothing when the model runs: T goes
into the weight of the linear that reads x, the means into its output biases,

    W ((x - m_x) T + m_y) + b  =  (W T) (x - m_x) + (W m_y + b).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_freeact.moments import Moments
from optimum_freeact.numerics.matrix_mean import damped, inverse_geometric_mean


BLOCK = 16  # channels, the best of the paper's sizes
SHRINKAGE = 0.05  # of each block's covariance towards its mean variance


@dataclass(frozen=True)
class Compensation:
    """The map of one input.

    Args:
        blocks (`torch.Tensor` of shape `(d / g, g, g)`): T, symmetric, float64.
        means (`torch.Tensor` of shape `(n_types, d)`): Wanted means m_y.
        mean (`torch.Tensor` of shape `(d,)`): Wanted mean of all tokens.
    """

    blocks: torch.Tensor
    means: torch.Tensor
    mean: torch.Tensor

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """W T of a weight `(out, d)`."""
        g = self.blocks.shape[-1]
        return torch.einsum("obi,bij->obj", weight.unflatten(-1, (-1, g)), self.blocks.to(weight)).flatten(1)

    def wanted(self, n_means: int) -> torch.Tensor:
        """Means for `n_means` rows of biases: one for all tokens, or one per type."""
        return self.mean.unsqueeze(0) if n_means <= 1 else self.means


def block_size(width: int) -> int:
    """Channels per block: the paper's 16, or the largest divisor of the width below it."""
    return next(size for size in range(BLOCK, 0, -1) if width % size == 0)


def block_covariances(moments: Moments, size: int) -> torch.Tensor:
    """Diagonal blocks `(d / size, size, size)` of the covariance about each type's own mean, pooled over types."""
    total = moments.count.sum().clamp_min(1)
    pooled = 0
    for kind in range(moments.n_types):
        if moments.count[kind] > 0:
            covariance = moments.covariance(kind, moments.mean(kind))
            blocks = covariance.unflatten(0, (-1, size)).unflatten(-1, (-1, size))
            index = torch.arange(blocks.shape[0], device=blocks.device)
            pooled = pooled + moments.count[kind] / total * blocks[index, :, index]
    return pooled


def fit_compensation(actual: Moments, wanted: Moments, shrinkage: float = SHRINKAGE) -> Compensation:
    """The map from moments of the quantized layer's attention output to those of the full-precision one's."""
    size = block_size(actual.shift.shape[1])
    s_x, s_y = (block_covariances(m, size) for m in (actual, wanted))
    shrunk = [(1 - shrinkage) * s + shrinkage * mean_variance(s) for s in (s_x, s_y)]
    blocks = inverse_geometric_mean(damped(shrunk[0]), damped(shrunk[1]))
    means = torch.stack([wanted.mean(kind) for kind in range(wanted.n_types)])
    return Compensation(blocks, means, wanted.mean())


def mean_variance(blocks: torch.Tensor) -> torch.Tensor:
    """Each block's mean variance times the identity."""
    mean = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)
    return mean[:, None, None] * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
