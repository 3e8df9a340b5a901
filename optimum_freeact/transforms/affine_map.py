r"""The map from a layer's input to the coordinates that are rounded, and what it makes of weights and moments.

For an input row x of type k, with mean \\( \mu_k \\), channel scale s, low-rank basis U (orthonormal columns) and
invertible transform A:

    u = (x - mu_k) * s                 centred and scaled
    p = u U                            r coordinates kept in high precision
    z = (u - p U^T) A                  rounded to few bits

and with V = (W / s) (I - U U^T) A^{-T}, L = (W / s) U (2 I - U^T U), b_k = W mu_k + b, for every x and every type, without
rounding,

    y = z V^T + p L^T + b_k = W x + b.

This is exact for any mu, s, U and invertible A (tested in float64): the calibration may choose them freely. V = (W / s) A^{-T}
with L = (W / s) U would be exact as well; but z has nothing in the directions of U except the noise of rounding, which V must
not read. It stays exact if types use columns of U of their own (`uses`): with U_k those of type k and U_s those that all use,
P_k = [(I - U_k U_k^T) A, U_k, 0] and one weight side for all, [A^{-1} (I - U_s U_s^T); (I + D - U^T U D) U^T], D = 1 for the
columns of U_s, have the product I for every type. Masks (`keep`) set some coordinates of z to zero for some types;
they are an approximation (transforms/exclusive.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_freeact.numerics.kronecker import kron_apply


@dataclass
class InputMap:
    """Parameters of the map; absent parts are `None`. All float64 while fitting.

    Args:
        mean (`torch.Tensor` of shape `(n_types or 1, d)`, *optional*): Per-type means mu.
        channel_scale (`torch.Tensor` of shape `(d,)`, *optional*): s, positive.
        basis (`torch.Tensor` of shape `(d, r)`, *optional*): U.
        uses (`torch.Tensor` of shape `(n_types, r)`, *optional*): 1 for the columns of U that a type uses; all by default.
        left, right (`torch.Tensor` of shapes `(a, a)`, `(b, b)`, *optional*): A = left (x) right, a * b = d.
        dense (`torch.Tensor` of shape `(d, d)`, *optional*): A itself. Not together with `left`.
        left_out (`torch.Tensor` of shape `(d, R)`, *optional*): Directions that single types leave out of x - mu_k.
        leaves_out (`torch.Tensor` of shape `(n_types, R)`, *optional*): 1 for the directions that a type leaves out.
        keep (`torch.Tensor` of shape `(n_types, d)`, *optional*): 1 for the coordinates of z that a type uses, else 0.
    """

    mean: torch.Tensor | None = None
    channel_scale: torch.Tensor | None = None
    basis: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    left_out: torch.Tensor | None = None
    leaves_out: torch.Tensor | None = None
    uses: torch.Tensor | None = None

    def to(self, *args, **kwargs) -> InputMap:
        """All tensors moved or cast as by `torch.Tensor.to`."""
        return InputMap(**{k: v if v is None else v.to(*args, **kwargs) for k, v in vars(self).items()})

    def centre(self, x: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        """`x - mu_k`; `types` of shape `x.shape[:-1]`, or `None` for type 0 throughout."""
        return x if self.mean is None else x - pick(self.mean, types)

    def apply(self, x: torch.Tensor, types: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Coordinates z and p of rows `x` of shape `(..., d)`."""
        u = self.centre(x, types)
        if self.left_out is not None:
            u = u - ((u @ self.left_out) * pick(self.leaves_out, types).to(u.dtype)) @ self.left_out.mT
        z, p = self.apply_centred(u, types)
        return z if self.keep is None else z * pick(self.keep, types).to(z.dtype), p

    def apply_centred(
        self, u: torch.Tensor, types: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Coordinates z and p of rows that are centred already."""
        if self.channel_scale is not None:
            u = u * self.channel_scale
        p = None
        if self.basis is not None:
            flat = u.flatten(0, -2)
            p = flat @ self.basis
            if self.uses is not None:
                whose = None if types is None else types.flatten()
                p = p * pick(self.uses, whose).to(p.dtype)
            u = torch.addmm(flat, p, self.basis.mT, alpha=-1).view(u.shape)
            p = p.view(*u.shape[:-1], -1)
        return self._rotate(u), p

    def _rotate(self, u: torch.Tensor) -> torch.Tensor:
        if self.left is not None:
            return kron_apply(u, self.left, self.right)
        return u if self.dense is None else u @ self.dense

    def transform_weight(
        self, weight: torch.Tensor, inverses: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """V of shape `(out, d)` and L of shape `(out, r)` of a weight of shape `(out, d)`.

        `inverses` of the Kronecker factors may be given where several weights share them.
        """
        scaled = weight if self.channel_scale is None else weight / self.channel_scale
        scaled, low_rank = self._split(scaled)
        if self.left is not None:
            left, right = inverses or (torch.linalg.inv(self.left), torch.linalg.inv(self.right))
            return kron_apply(scaled, left.mT, right.mT), low_rank
        if self.dense is not None:
            return torch.linalg.solve(self.dense, scaled.mT).mT, low_rank
        return scaled, low_rank

    def _split(self, scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A scaled weight without what lies in the directions that all types carry around, and L."""
        if self.basis is None:
            return scaled, None
        shared = self.basis.new_ones(self.basis.shape[1]) if self.uses is None else self.uses.prod(0)
        inside = scaled @ self.basis
        gram = self.basis.mT @ self.basis
        outside = scaled - (inside * shared) @ self.basis.mT
        return outside, inside + inside * shared - (inside * shared) @ gram

    def restore_weight(self, v: torch.Tensor, low_rank: torch.Tensor | None, kind: int = 0) -> torch.Tensor:
        """W from V and L: inverse of [`transform_weight`], as far as a type of tokens reads them."""
        w = v @ self.dense.mT if self.dense is not None else v
        if self.left is not None and self.right is not None:
            w = kron_apply(v, self.left.mT, self.right.mT)
        if self.basis is not None and low_rank is not None:
            own = slice(None) if self.uses is None else self.uses[kind].bool()
            basis = self.basis[:, own]
            w = w - w @ basis @ basis.mT + low_rank[:, own] @ basis.mT
        return w if self.channel_scale is None else w * self.channel_scale

    def transform_moments(self, moments: torch.Tensor, kind: int = 0) -> torch.Tensor:
        """Second moments of z from those of the centred x of a type (also of a cross moment), shape `(d, d)`."""
        types = torch.full((len(moments),), kind, device=moments.device)
        half, _ = self.apply_centred(moments, types)  # M J, where z = x J
        return self.apply_centred(half.mT, types)[0].mT


def pick(table: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
    """Row of `table` for each type: shape `types.shape + (width,)`, or `(width,)` where one row serves all."""
    if types is None or table.shape[0] == 1:
        return table[0]
    if table.shape[0] == 2:  # a select needs no gather and fuses
        return torch.where(types.unsqueeze(-1) == 1, table[1], table[0])
    return torch.nn.functional.embedding(types, table)
