"""Streamed first and second moments of a linear layer's input, per token type.

Sums are accumulated in float64 about a fixed shift (the first batch's mean), so that subtracting means later cancels
no digits, and memory does not grow with the number of tokens.
"""

from __future__ import annotations

import torch


class Moments:
    """Counts, means and centred second moments of rows `x`, optionally crossed with paired rows `y`.

    `y` are the inputs that the same tokens have in the full-precision model; their cross moments tell how the weight
    must change so that `W' x` best predicts `W y` (see [`optimum_freeact.transforms.correction`]).

    Args:
        n_features (`int`): Width of the rows.
        n_types (`int`): Number of token types.
        device (`torch.device`): Where sums live.
        paired (`bool`, *optional*, defaults to `False`): Whether [`update`] gets `y` too.
        n_rows (`int`, *optional*, defaults to 512): Sample rows kept (evenly over batches) for measuring real rounding.
    """

    def __init__(
        self, n_features: int, n_types: int, device: torch.device, *, paired: bool = False, n_rows: int = 512
    ):
        self.n_types = n_types
        self.count = torch.zeros(n_types, dtype=torch.float64, device=device)
        self.sum = torch.zeros(n_types, n_features, dtype=torch.float64, device=device)
        self.second = torch.zeros(n_types, n_features, n_features, dtype=torch.float64, device=device)
        self.peak = torch.zeros(n_features, dtype=torch.float32, device=device)  # largest |x| per channel
        self.paired = paired
        self.sum_y = torch.zeros_like(self.sum) if paired else None
        self.cross = torch.zeros_like(self.second) if paired else None  # sum of y^T x
        self.shift: torch.Tensor | None = None
        self.n_rows = n_rows
        self._rows: list[torch.Tensor] = []
        self._row_types: list[torch.Tensor] = []

    def update(self, x: torch.Tensor, types: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Add rows.

        Args:
            x (`torch.Tensor` of shape `(n, n_features)`): Any floating dtype.
            types (`torch.Tensor` of shape `(n,)`): Integer types in `[0, n_types)`.
            y (`torch.Tensor` of shape `(n, n_features)`, *optional*): Paired rows.
        """
        x = x.float()
        if self.shift is None:
            self.shift = x.mean(0)
        self.peak = torch.maximum(self.peak, x.abs().amax(0))
        keep = max(1, self.n_rows // 8)
        if sum(len(rows) for rows in self._rows) < self.n_rows:
            picked = torch.linspace(0, len(x) - 1, min(keep, len(x)), device=x.device).long()
            self._rows.append(x[picked].clone())
            self._row_types.append(types[picked].clone())
        x = x - self.shift
        if y is not None:
            y = y.float() - self.shift
        for kind in range(self.n_types):
            chosen = types == kind
            n = int(chosen.sum())
            if n == 0:
                continue
            rows = x if n == len(x) else x[chosen]
            self.count[kind] += n
            self.sum[kind] += rows.sum(0, dtype=torch.float64)
            self.second[kind] += rows.mT @ rows
            if y is not None:
                other = y if n == len(y) else y[chosen]
                self.sum_y[kind] += other.sum(0, dtype=torch.float64)
                self.cross[kind] += other.mT @ rows

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept sample rows of shape `(r, n_features)` (float32) and their types `(r,)`."""
        return torch.cat(self._rows), torch.cat(self._row_types)

    def is_finite(self) -> bool:
        """Whether no NaN or inf was seen."""
        return bool(torch.isfinite(self.sum).all() and torch.isfinite(self.second).all())

    def mean(self, kind: int | None = None) -> torch.Tensor:
        """Mean row of one type, or of all tokens, float64; a type that was never seen gets the mean of all."""
        if kind is not None and self.count[kind] > 0:
            return self.sum[kind] / self.count[kind] + self.shift.double()
        return self.sum.sum(0) / self.count.sum() + self.shift.double()

    def mean_of_pair(self, kind: int | None = None) -> torch.Tensor:
        """Like [`mean`], of the paired rows `y`."""
        if kind is not None and self.count[kind] > 0:
            return self.sum_y[kind] / self.count[kind] + self.shift.double()
        return self.sum_y.sum(0) / self.count.sum() + self.shift.double()

    def covariance(self, kind: int, centre: torch.Tensor) -> torch.Tensor:
        """Mean of `(x - centre)^T (x - centre)` over one type, float64, positive semi-definite by construction."""
        n = self.count[kind].clamp_min(1)
        offset = self.sum[kind] / n  # mean relative to the shift
        about_mean = self.second[kind] / n - torch.outer(offset, offset)
        gap = offset + self.shift.double() - centre
        return about_mean + torch.outer(gap, gap)

    def cross_covariance(self, kind: int, centre_y: torch.Tensor, centre_x: torch.Tensor) -> torch.Tensor:
        """Mean of `(y - centre_y)^T (x - centre_x)` over one type, float64."""
        n = self.count[kind].clamp_min(1)
        offset_x, offset_y = self.sum[kind] / n, self.sum_y[kind] / n
        about_means = self.cross[kind] / n - torch.outer(offset_y, offset_x)
        gap_x = offset_x + self.shift.double() - centre_x
        gap_y = offset_y + self.shift.double() - centre_y
        return about_means + torch.outer(gap_y, gap_x)
