"""What a kernel reads of a layer's input side: the stored map once more, in the types and order the kernels want."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from optimum_freeact.kernels.reference import in_fours, n_marks
from optimum_freeact.transforms.affine_map import InputMap


def padded(size: int) -> int:
    """Edge of the smallest tile that tensor cores take and that holds `size`: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def branch_width(rank: int, n_types: int) -> int:
    """Columns of the padded branch: the high-precision coordinates, then the marks of token types (`reference.marked`)."""
    return padded(rank + max(n_types, n_marks(n_types)))


TENSORS = (
    "mean", "channel_scale", "basis", "basis_scale", "left", "right", "clip", "factor", "mean_branch", "reach",
)  # fmt: skip


@dataclass
class InputTables:
    """Constants of one input, see [`make_tables`].

    Args:
        mean (`bfloat16`, shape `(n_means, d)`, *optional*): Means of the token types.
        channel_scale (`float32`, shape `(d,)`, *optional*): Scale of each channel.
        basis (*optional*): Codes of the branch's basis, transposed. For C `int8` of shape `(r, d)`. For Triton `bfloat16`,
            which holds codes and means exactly, of shape `(padded branch, d)`: after the codes the means (zeros with a
            channel scale), then zeros.
        basis_scale (`float32`, shape `(r,)`, *optional*): Their scales.
        left (`float16`, shape `(padded a, padded a)`): Left factor, transposed, padded by repeating its first row, so that
            a padded tile has the same extremes.
        right (`float16`, shape `(padded b, padded b)`): Right factor, columns as in [`column_order`].
        clip (`float32`, shape `(n_types,)`): Share of the range kept, per type.
        factor (`float32`, shape `()`): The stored factors' product is that of `left` and `right` times this.
        mean_branch (`float32`, shape `(n_means, r)`, *optional*): Scaled means times the codes of the basis: what a row's
            product with the basis has too much when the row is not centred first. For Triton only.
        reach (`float32`, shape `(max(1, n_means) + 1,)`, *optional*): Largest magnitude of each scaled mean, and of the
            channel scale. For Triton only.
        a, b (`int`): Sizes of the factors.
        bits (`int`): 4 or 8.
        symmetric (`bool`): Kind of the grid.
        group (`int`): 0 for codes with one grid a row; else values with a grid for so many columns. For Triton only.
    """

    mean: torch.Tensor | None
    channel_scale: torch.Tensor | None
    basis: torch.Tensor | None
    basis_scale: torch.Tensor | None
    left: torch.Tensor
    right: torch.Tensor
    clip: torch.Tensor
    factor: torch.Tensor
    mean_branch: torch.Tensor | None
    reach: torch.Tensor | None
    a: int
    b: int
    bits: int
    symmetric: bool
    group: int = 0

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All tensors, in the order of the fields."""
        return tuple(getattr(self, name) for name in TENSORS)

    def input_map(self) -> InputMap:
        """The map once more, float32, as far as float16 factors hold it."""
        basis = None
        if self.rank:
            assert self.basis is not None
            assert self.basis_scale is not None
            basis = (self.basis[: self.rank].float() * self.basis_scale[:, None]).mT
        mean = None if self.mean is None else self.mean.float()
        found = InputMap(mean=mean, channel_scale=self.channel_scale, basis=basis)
        if self.left.dtype == torch.float32:
            found.left, found.right = self.left.mT, self.right
            return found
        right = torch.empty_like(self.right[: self.b, : self.b], dtype=torch.float32)
        right[:, column_order(self.a, self.b, self.group)] = self.right[: self.b, : self.b].float()
        found.left, found.right = self.left[: self.a, : self.a].float().mT * self.factor, right
        return found

    @property
    def width(self) -> int:
        """Number of input features."""
        return self.a * self.b

    @cached_property
    def n_clips(self) -> int:
        """Token types with a clip of their own."""
        return len(self.clip)

    @cached_property
    def n_means(self) -> int:
        """Means, or one where there is none."""
        return 1 if self.mean is None else len(self.mean)

    @cached_property
    def rank(self) -> int:
        """Columns of the branch."""
        return 0 if self.basis_scale is None else len(self.basis_scale)

    @cached_property
    def one_pass(self) -> bool:
        """Whether rows are read once (`rounding_pass_triton`): there is no branch, and factors and tile fit together."""
        a, b = padded(self.a), padded(self.b)
        return self.rank == 0 and self.group == 0 and 2 * (a * a + a * b + b * b) <= PASS_BYTES

    @cached_property
    def has_branch(self) -> bool:
        """Whether rows leave with coordinates, and marks of types beside them."""
        return self.rank > 0

    @cached_property
    def branch(self) -> int:
        """Columns of the padded branch."""
        return branch_width(self.rank, self.n_clips)


PASS_BYTES = 128 * 1024  # of both factors and a tile beside each other in shared memory


def runs_in_tiles(a: int, b: int, group: int) -> bool:
    """Whether a tile's row holds whole grids, in runs that a kernel can take apart."""
    return group in (0, a * b) or (b % group == 0 and group & (group - 1) == 0)


def column_order(a: int, b: int, group: int) -> torch.Tensor:
    """Columns of the right factor as Triton's kernels have them: in each run of a tile's columns that share a grid the even
    ones before the odd ones; in their own order where a grid's columns are no such run.
    """
    run = b if group == 0 else b & -b if group == a * b else group
    if not runs_in_tiles(a, b, group):
        return torch.arange(b)
    return torch.arange(b).view(-1, run // 2, 2).mT.flatten()


def half_factor(matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A matrix in float16 and the factor it lacks.

    A rotation whose entries have all one magnitude (a Hadamard matrix over its root) becomes plus and minus one power of
    two, which float16 and every product with it hold exactly; others are rounded to 11 bits and shrunk to a norm of at
    most one, so that no product of a row outgrows float16.
    """
    size = float(matrix.abs().max())
    if size > 0 and torch.allclose(matrix.abs(), torch.full_like(matrix, size), rtol=1e-5, atol=0.0):
        power = 2.0 ** math.floor(math.log2(size) + 1e-6)
        return (matrix.sign() * power).half(), size / power
    norm = float(torch.linalg.matrix_norm(matrix.float(), 2))
    shrink = 2.0 ** math.ceil(math.log2(norm) - 1e-3) if norm > 0 else 1.0
    return (matrix / shrink).half(), shrink


def _lines(mean: torch.Tensor | None, basis: torch.Tensor | None, n_types: int, d: int) -> torch.Tensor | None:
    """What is taken off a row: codes of the basis, then means, in bfloat16, padded with zeros."""
    if mean is None and basis is None:
        return None
    rank = 0 if basis is None else basis.shape[1]
    like = basis if mean is None else mean
    assert like is not None
    lines = torch.zeros(branch_width(rank, n_types), d, dtype=torch.bfloat16, device=like.device)
    if basis is not None:
        lines[:rank] = basis.mT
    if mean is not None:
        lines[rank : rank + len(mean)] = mean
    return lines


def _reach(mean: torch.Tensor | None, channel_scale: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    means = like.new_zeros(1) if mean is None else mean.abs().amax(1)
    scale = like.new_ones(1) if channel_scale is None else channel_scale.abs().amax()[None]
    return torch.cat((means.float(), scale.float()))


def make_tables(
    found: InputMap, basis: torch.Tensor | None, basis_scale: torch.Tensor | None, clip: torch.Tensor, bits: int,
    symmetric: bool, group: int = 0,
) -> InputTables:  # fmt: skip
    """Tables of a stored map with Kronecker factors (float32) and of the codes of its basis, shape `(d, r)`; `group` as in
    [`InputTables`].
    """
    if basis is not None and basis_scale is not None:
        basis, basis_scale = in_fours(basis), in_fours(basis_scale)
    left, left_factor = half_factor(found.left)
    right, right_factor = half_factor(found.right)
    a, b = len(left), len(right)
    padded_left = left.new_zeros(padded(a), padded(a))
    padded_left[:, :a] = left.mT[:1]
    padded_left[:a, :a] = left.mT
    padded_right = right.new_zeros(padded(b), padded(b))
    padded_right[:b, :b] = right[:, column_order(a, b, group)]
    mean = None if found.mean is None else found.mean.to(torch.bfloat16).contiguous()
    assert found.left is not None
    assert found.right is not None
    scaled = None if mean is None else mean.double() * (1 if found.channel_scale is None else found.channel_scale)
    return InputTables(
        mean=mean,
        channel_scale=found.channel_scale,
        basis=_lines(
            mean if found.channel_scale is None else None, basis, len(clip), len(found.left) * len(found.right)
        ),
        basis_scale=basis_scale,
        mean_branch=None if scaled is None or basis is None else (scaled @ basis.double()).float(),
        reach=_reach(scaled, found.channel_scale, clip),
        left=padded_left,
        right=padded_right,
        clip=clip,
        factor=torch.tensor(left_factor * right_factor, device=clip.device),
        a=a,
        b=b,
        bits=bits,
        symmetric=symmetric,
        group=group,
    )


def make_native_tables(
    found: InputMap,
    basis: torch.Tensor | None,
    basis_scale: torch.Tensor | None,
    clip: torch.Tensor,
    bits: int,
    symmetric: bool,
) -> InputTables:
    """The same for the kernels in C: float32 factors as they are, the left one transposed."""
    assert found.left is not None
    assert found.right is not None
    return InputTables(
        mean=None if found.mean is None else found.mean.to(torch.bfloat16).contiguous(),
        channel_scale=found.channel_scale,
        basis=None if basis is None else basis.mT.contiguous(),
        basis_scale=basis_scale,
        left=found.left.mT.contiguous(),
        right=found.right.contiguous(),
        clip=clip,
        factor=torch.ones((), device=clip.device),
        mean_branch=None,
        reach=None,
        a=len(found.left),
        b=len(found.right),
        bits=bits,
        symmetric=symmetric,
    )
