"""The kernel in C as a torch operator, opaque to `torch.compile`: a whole linear from the tensors that C reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimum_freeact.kernels.native import NativeSide, NativeWeight
from optimum_freeact.kernels.reference import Weight
from optimum_freeact.kernels.tables import TENSORS, InputTables


READ = ("mean", "channel_scale", "basis", "basis_scale", "left", "right", "clip")  # tables that C reads


def _linear(
    x: Tensor,
    types: Tensor | None,
    mean: Tensor | None,
    channel_scale: Tensor | None,
    basis: Tensor | None,
    basis_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    a: int,
    b: int,
    bits: int,
    symmetric: bool,
    group: int,
    packed: Tensor,
    qscale: Tensor,
    row_sum: Tensor,
    low_rank: Tensor | None,
    low_rank_scale: Tensor | None,
    type_bias: Tensor | None,
    group_scale: Tensor | None,
    turned: Tensor | None,
    panels: Tensor | None,
) -> Tensor:
    """Output `(..., m)` of `x` `(..., d)`; `turned` and `panels` are the weight's copies in C's own order."""
    read = dict(zip(READ, (mean, channel_scale, basis, basis_scale, left, right, clip), strict=True))
    tensors: dict[str, Any] = dict.fromkeys(TENSORS) | read
    tables = InputTables(**tensors, a=a, b=b, bits=bits, symmetric=symmetric)
    weight = Weight(packed, qscale, row_sum, low_rank, low_rank_scale, type_bias)
    return NativeSide(tables, group).linears(x, types, [NativeWeight(weight, group_scale, (turned, panels))])[0]


linear_op = torch.library.custom_op("freeact::native_linear", _linear, mutates_args=())


@linear_op.register_fake
def _(x, types, *rest):  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], rest[12].shape[0]))


def linear(x: Tensor, types: Tensor | None, side: NativeSide, weight: NativeWeight) -> Tensor:
    """A linear in a traced graph."""
    tables = side.tables
    grid = (tables.a, tables.b, tables.bits, tables.symmetric, side.group)
    read = [getattr(tables, name) for name in READ]
    return linear_op(x, types, *read, *grid, *weight.weight[:6], weight.group_scale, *weight.copies)
