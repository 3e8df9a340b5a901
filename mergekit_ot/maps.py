"""Linear maps between the channels of two models: dense, or a few weighted picks per row.

A map is only ever multiplied onto a weight from the left (the space a weight writes) or from the right (the space it
reads), so those two products are its whole interface. Sparse maps keep plans of wide MLPs small on disk and in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class LinearMap(Protocol):
    """A matrix of shape `(n_out, n_in)` known by its products."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_out, n_in)`."""

    def left(self, matrix: torch.Tensor) -> torch.Tensor:
        """`self @ matrix`, shape `(n_out, m)`."""

    def right(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix @ self`, shape `(m, n_in)`."""


@dataclass(frozen=True)
class DenseMap:
    """A map stored as its matrix `(n_out, n_in)`."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_out, n_in)`."""
        return tuple(self.matrix.shape)

    def left(self, matrix: torch.Tensor) -> torch.Tensor:
        """`self @ matrix`."""
        return self.matrix.to(matrix) @ matrix

    def right(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix @ self`."""
        return matrix @ self.matrix.to(matrix)


@dataclass(frozen=True)
class SparseMap:
    """A map whose row `i` is `sum_k weight[i, k] · e[index[i, k]]`.

    Args:
        index (`torch.Tensor` of shape `(n_out, r)`, int64): input channels each output channel mixes.
        weight (`torch.Tensor` of shape `(n_out, r)`): their weights; 0 pads short rows.
        n_in (`int`): input channels.
    """

    index: torch.Tensor
    weight: torch.Tensor
    n_in: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_out, n_in)`."""
        return self.index.shape[0], self.n_in

    def left(self, matrix: torch.Tensor) -> torch.Tensor:
        """`self @ matrix`, by gathering rows."""
        index, weight = self.index.to(matrix.device), self.weight.to(matrix)
        result = weight[:, :1] * matrix[index[:, 0]]
        for k in range(1, index.shape[1]):
            result += weight[:, k : k + 1] * matrix[index[:, k]]
        return result

    def right(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix @ self`."""
        if not adds_in_order(matrix):
            return matrix @ self.dense(matrix)
        result = matrix.new_zeros(matrix.shape[0], self.n_in)
        for k in range(self.index.shape[1]):
            result.index_add_(1, self.index[:, k], matrix * self.weight[:, k].to(matrix))
        return result

    def dense(self, like: torch.Tensor) -> torch.Tensor:
        """The matrix itself, in the dtype and on the device of `like`."""
        index, weight = self.index.cpu(), self.weight.cpu()
        matrix = weight.new_zeros(self.shape)  # not `torch.zeros`: mergekit's workers change the default device
        matrix.scatter_add_(1, index, weight)
        return matrix.to(like)


def adds_in_order(matrix: torch.Tensor) -> bool:
    """Whether adding by index on the tensor's device has one order, and so one result."""
    return not matrix.is_cuda


def sparsify(matrix: torch.Tensor, max_picks: int = 16) -> tuple[SparseMap, float]:
    """Keep the largest entries of each row and restore the row's sum.

    Args:
        matrix (`torch.Tensor` of shape `(n_out, n_in)`): non-negative row-stochastic map.
        max_picks (`int`, *optional*, defaults to 16): entries kept per row.

    Returns:
        The [`SparseMap`], and the largest share of mass that any row lost.
    """
    picks = int(min(max_picks, max(1, int((matrix > 0).sum(dim=1).max()))))
    weight, index = matrix.topk(picks, dim=1)
    total = matrix.sum(dim=1, keepdim=True)
    kept = weight.sum(dim=1, keepdim=True)
    lost = float(torch.where(total > 0, 1.0 - kept / total.clamp_min(1e-30), torch.zeros_like(total)).max())
    weight = weight * torch.where(kept > 0, total / kept.clamp_min(1e-30), torch.zeros_like(kept))
    return SparseMap(index.cpu(), weight.cpu(), matrix.shape[1]), max(lost, 0.0)


def one_hot(index: torch.Tensor, n_in: int, weight: torch.Tensor | None = None) -> SparseMap:
    """The map that picks channel `index[i]` for row `i`, with an optional factor such as a sign."""
    weight = torch.ones(index.shape[0]) if weight is None else weight
    return SparseMap(index.reshape(-1, 1).cpu(), weight.reshape(-1, 1).cpu(), n_in)
