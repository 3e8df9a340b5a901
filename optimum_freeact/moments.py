"""Streamed first and second moments of a linear layer's input, per token type.

Sums are accumulated in float64 about a fixed shift per type (the mean of the type's first batch), so that subtracting
means later cancels no digits, and memory does not grow with the number of tokens. The shift must be the type's own:
a sink token's input is thousands of times larger than the others', and about the others' mean its rounding errors alone
exceed its variance (measured on SmolLM2: covariances lost their positivity, and everything fitted to them diverged).

Tokens have grids of their own, so what rounding takes from each is a share of its own energy; what is fitted shall make these
shares small, and not the error of whoever is loudest. So, inside a type, rows may count less the louder they are beyond what is usual there
([`loudness_weights`]): without that, a few image tokens that act as attention sinks move their type's mean to themselves, and
what all other tokens of the type have left is mostly that mean.
"""

from __future__ import annotations

import torch

from optimum_freeact.numerics.finite import all_finite


def loudness_weights(rows: torch.Tensor, limit: float | None, usual: torch.Tensor | None = None) -> torch.Tensor:
    """How much each of some rows of one type counts, shape `(n,)`.

    One, or where a row has more than `limit` times the `usual` energy (the rows' median by default) so much that it has no more
    say than a row of just that energy. Without a limit all count alike.
    """
    energy = rows.float().square().sum(1)
    if limit is None or len(energy) == 0:
        return torch.ones_like(energy)
    usual = energy.median() if usual is None else usual
    if usual == 0:  # most rows are zeros
        return torch.ones_like(energy)
    return (limit * usual / energy.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num(0.0).clamp(max=1)


def loudness_of_types(rows: torch.Tensor, types: torch.Tensor, limit: float | None) -> torch.Tensor:
    """[`loudness_weights`] of rows of several types, each beside its own, float64 of shape `(n,)`."""
    weights = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
    for kind in types.unique() if limit is not None else ():
        weights[types == kind] = loudness_weights(rows[types == kind], limit).double()
    return weights


class Moments:
    """Counts, weighted means and centred second moments of rows `x`, optionally crossed with paired rows `y`.

    `y` are the inputs that the same tokens have in the full-precision model; their cross moments tell how the weight
    must change so that `W' x` best predicts `W y` (see `optimum_freeact.transforms.correction`).

    Args:
        n_features (`int`): Width of the rows.
        n_types (`int`): Number of token types.
        device (`torch.device`): Where sums live.
        paired (`bool`, *optional*, defaults to `False`): Whether [`update`] gets `y` too.
        peaks (`bool`, *optional*, defaults to `False`): Whether the largest magnitude per channel is noted.
        limit (`float`, *optional*): Beyond so many times a type's usual energy a row counts less ([`loudness_weights`]).
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
        limit: float | None = None,
        n_rows: int = 512,
    ):
        self.n_types, self.limit = n_types, limit
        self.count = torch.zeros(n_types, dtype=torch.float64, device=device)
        self.weight = torch.zeros_like(self.count)  # of the rows, by how loud each is
        self.shift = torch.zeros(n_types, n_features, dtype=torch.float64, device=device)
        self.sum = torch.zeros_like(self.shift)  # of x - shift
        self.second = torch.zeros(n_types, n_features, n_features, dtype=torch.float64, device=device)
        # largest |x| per channel
        self.peak = torch.zeros(n_features, dtype=torch.float32, device=device) if peaks else None
        self.paired = paired
        self.sum_y = torch.zeros_like(self.sum) if paired else None
        self.cross = torch.zeros_like(self.second) if paired else None  # sum of (y - shift)^T (x - shift)
        self.n_rows = n_rows
        self._usual: list[torch.Tensor | None] = [None] * n_types  # median energy of a type's first rows
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
            weights = self._weights(x, chosen, kind)
            if self.count[kind] == 0:  # a float32 number, so that float32 rows are shifted without a second rounding
                own, share = x[chosen], weights[chosen, None]
                self.shift[kind] = ((own * share).sum(0, dtype=torch.float64) / share.sum(dtype=torch.float64)).float()
            rows = self._about_shift(x, chosen, n, kind)
            weights = weights[chosen] if len(rows) < len(x) else weights
            scaled = rows * weights[:, None].to(rows.dtype) if self.limit is not None else rows
            self.count[kind] += n
            self.weight[kind] += weights.sum(dtype=torch.float64)
            self.sum[kind] += scaled.sum(0, dtype=torch.float64)
            self.second[kind] += rows.mT @ scaled
            if y is not None:
                other = self._about_shift(y.float(), chosen, n, kind)
                sum_y, cross = self.pair_sums
                sum_y[kind] += (other * weights[:, None].to(other.dtype)).sum(0, dtype=torch.float64)
                cross[kind] += other.mT @ scaled

    def _weights(self, x: torch.Tensor, chosen: torch.Tensor, kind: int) -> torch.Tensor:
        """[`loudness_weights`] of the chosen rows, zeros for the others."""
        if self.limit is None:
            return chosen.float()
        own = x[chosen]
        if self._usual[kind] is None:
            self._usual[kind] = own.square().sum(1).median()
        weights = x.new_zeros(len(x))
        weights[chosen] = loudness_weights(own, self.limit, self._usual[kind])
        return weights

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
        return all_finite(self.sum) and all_finite(self.second)

    def _overall(self, sums: torch.Tensor) -> torch.Tensor:
        return (sums + self.shift * self.weight[:, None]).sum(0) / self.weight.sum()

    def mean(self, kind: int | None = None) -> torch.Tensor:
        """Mean row of one type, or of all tokens, float64; a type that was never seen gets the mean of all."""
        if kind is not None and self.count[kind] > 0:
            return self.sum[kind] / self.weight[kind] + self.shift[kind]
        return self._overall(self.sum)

    def mean_of_pair(self, kind: int | None = None) -> torch.Tensor:
        """Like [`mean`], of the paired rows `y`."""
        if kind is not None and self.count[kind] > 0:
            return self.pair_sums[0][kind] / self.weight[kind] + self.shift[kind]
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
        n = self.weight[kind].clamp_min(torch.finfo(torch.float64).tiny)
        left, right = sum_left / n, sum_right / n
        gap_left = left + self.shift[kind] - centre_left
        gap_right = right + self.shift[kind] - centre_right
        return product / n - torch.outer(left, right) + torch.outer(gap_left, gap_right)
