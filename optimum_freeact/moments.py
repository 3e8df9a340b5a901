"""Streamed first and second moments of a linear layer's input, per token type.

Sums are accumulated in float64 about a fixed shift per type (the mean of the type's first batch), so that subtracting
means later cancels no digits, and memory does not grow with the number of tokens. The shift must be the type's own:
a sink token's input is thousands of times larger than the others', and about the others' mean its rounding errors alone
exceed its variance (measured on SmolLM2: covariances lost their positivity, and everything fitted to them diverged).
"""

from __future__ import annotations

import torch


class Moments:
    """Counts, means and centred second moments of rows `x`, optionally crossed with paired rows `y`.

    `y` are the inputs that the same tokens have in the full-precision model; their cross moments tell how the weight
    must change so that `W' x` best predicts `W y` (see `optimum_freeact.transforms.correction`).

    Args:
        n_features (`int`): Width of the rows.
        n_types (`int`): Number of token types.
        device (`torch.device`): Where sums live.
        paired (`bool`, *optional*, defaults to `False`): Whether [`update`] gets `y` too.
        peaks (`bool`, *optional*, defaults to `False`): Whether the largest magnitude per channel is noted.
        n_rows (`int`, *optional*, defaults to 512): Sample rows kept (evenly over batches) for measuring real rounding.
    """

    def __init__(
        self,
        n_features: int,
        n_types: int,
        device: torch.device,
        *,
        paired: bool = False,
        peaks: bool = False,
        n_rows: int = 512,
    ):
        self.n_types = n_types
        self.count = torch.zeros(n_types, dtype=torch.float64, device=device)
        self.shift = torch.zeros(n_types, n_features, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.shift)  # of x - shift
        self.second = torch.zeros(n_types, n_features, n_features, dtype=torch.float64, device=device)
        # largest |x| per channel
        self.peak = torch.zeros(n_features, dtype=torch.float32, device=device) if peaks else None
        self.paired = paired
        self.sum_y = torch.zeros_like(self.sum) if paired else None
        self.cross = torch.zeros_like(self.second) if paired else None  # sum of (y - shift)^T (x - shift)
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
        if self.peak is not None:
            self.peak = torch.maximum(self.peak, x.abs().amax(0))
        self._keep_rows(x, types)
        for kind in range(self.n_types):
            chosen = types == kind
            n = int(chosen.sum())
            if n == 0:
                continue
            if self.count[kind] == 0:  # a float32 number, so that float32 rows are shifted without a second rounding
                self.shift[kind] = x[chosen].mean(0, dtype=torch.float64).float()
            rows = self._about_shift(x, chosen, n, kind)
            self.count[kind] += n
            self.sum[kind] += rows.sum(0, dtype=torch.float64)
            self.second[kind] += rows.mT @ rows
            if y is not None:
                other = self._about_shift(y.float(), chosen, n, kind)
                sum_y, cross = self.pair_sums
                sum_y[kind] += other.sum(0, dtype=torch.float64)
                cross[kind] += other.mT @ rows

    def _about_shift(self, x: torch.Tensor, chosen: torch.Tensor, n: int, kind: int) -> torch.Tensor:
        """The chosen rows less the type's shift; float64 where rows are few (they are cheap, and few rows vary little).

        Where most rows are chosen the others are zeroed, which spares a copy of all.
        """
        if n < x.shape[1] // 4:
            return x[chosen].double() - self.shift[kind]
        if 2 * n < len(x):
            return x[chosen] - self.shift[kind].float()
        rows = x - self.shift[kind].float()
        if n < len(x):
            rows[~chosen] = 0
        return rows

    def _keep_rows(self, x: torch.Tensor, types: torch.Tensor) -> None:
        if sum(len(rows) for rows in self._rows) < self.n_rows:
            n = min(max(1, self.n_rows // 8), len(x))
            picked = torch.linspace(0, len(x) - 1, n, device=x.device).long()
            self._rows.append(x[picked].clone())
            self._row_types.append(types[picked].clone())

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept sample rows of shape `(r, n_features)` (float32) and their types `(r,)`."""
        return torch.cat(self._rows), torch.cat(self._row_types)

    @property
    def pair_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the paired rows and of their products with the others, about the shifts.

        Raises:
            `ValueError`: for moments that were made without `paired`.
        """
        if self.sum_y is None or self.cross is None:
            raise ValueError("These moments hold no paired rows; make them with paired=True.")
        return self.sum_y, self.cross

    def is_finite(self) -> bool:
        """Whether no NaN or inf was seen."""
        return bool(torch.isfinite(self.sum).all() and torch.isfinite(self.second).all())

    def _overall(self, sums: torch.Tensor) -> torch.Tensor:
        return (sums + self.shift * self.count[:, None]).sum(0) / self.count.sum()

    def mean(self, kind: int | None = None) -> torch.Tensor:
        """Mean row of one type, or of all tokens, float64; a type that was never seen gets the mean of all."""
        if kind is not None and self.count[kind] > 0:
            return self.sum[kind] / self.count[kind] + self.shift[kind]
        return self._overall(self.sum)

    def mean_of_pair(self, kind: int | None = None) -> torch.Tensor:
        """Like [`mean`], of the paired rows `y`."""
        if kind is not None and self.count[kind] > 0:
            return self.pair_sums[0][kind] / self.count[kind] + self.shift[kind]
        return self._overall(self.pair_sums[0])

    def covariance(self, kind: int, centre: torch.Tensor) -> torch.Tensor:
        """Mean of `(x - centre)^T (x - centre)` over one type, float64."""
        return self._about(self.second[kind], self.sum[kind], self.sum[kind], kind, centre, centre)

    def cross_covariance(self, kind: int, centre_y: torch.Tensor, centre_x: torch.Tensor) -> torch.Tensor:
        """Mean of `(y - centre_y)^T (x - centre_x)` over one type, float64."""
        sum_y, cross = self.pair_sums
        return self._about(cross[kind], sum_y[kind], self.sum[kind], kind, centre_y, centre_x)

    def _about(self, product, sum_left, sum_right, kind, centre_left, centre_right) -> torch.Tensor:
        """Mean product about two centres, from sums about the type's shift."""
        n = self.count[kind].clamp_min(1)
        left, right = sum_left / n, sum_right / n
        gap_left = left + self.shift[kind] - centre_left
        gap_right = right + self.shift[kind] - centre_right
        return product / n - torch.outer(left, right) + torch.outer(gap_left, gap_right)
