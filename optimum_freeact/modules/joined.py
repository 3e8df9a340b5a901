"""Linears that read one input, as one product: their packed weights lie behind each other, and each has its part of the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from optimum_freeact.kernels.reference import SCALE_OUTPUTS, Weight, in_fours, type_columns
from optimum_freeact.modules.manners import keep_in_place


STORED = (
    "weight",
    "weight_group_scale",
    "low_rank",
)  # large enough to be held once: the linears keep views of the whole


class Reader(Protocol):
    """What is joined: a [`FreeActLinear`]."""

    span: tuple[int, int]
    out_features: int
    bits: int
    group_size: int
    weight: Tensor
    type_bias: Tensor | None

    def kernel_weight(self) -> Weight:
        """As a kernel reads it."""


class JoinedLinears:
    """One weight in the place of several; each reader's `span` says which outputs are its own.

    Args:
        readers (sequence of [`FreeActLinear`]): Prepared for Triton's kernels; see [`join`].
    """

    def __init__(self, readers: Sequence[Reader]):
        start = 0
        for reader in readers:
            reader.span = (start, start + reader.out_features)
            start += reader.out_features
        whole: dict[str, Tensor | None] = dict.fromkeys(STORED)
        for name in STORED:
            if getattr(readers[0], name) is not None:
                whole[name] = joined = torch.cat([getattr(reader, name).data for reader in readers])
                for reader in readers:
                    getattr(reader, name).data = joined[slice(*reader.span)]
        packed = whole["weight"]
        assert packed is not None
        weights = [reader.kernel_weight() for reader in readers]
        scales = [
            w.low_rank_scale.expand(reader.out_features // SCALE_OUTPUTS, -1)
            for w, reader in zip(weights, readers, strict=True)
            if w.low_rank_scale is not None
        ]
        biases = [w.type_bias for w in weights if w.type_bias is not None]
        bias = torch.cat(biases, 1) if biases else None
        self.weight = Weight(
            packed.flatten(1),
            torch.cat([w.qscale for w in weights]),
            torch.cat([w.row_sum for w in weights]),
            None if whole["low_rank"] is None else in_fours(whole["low_rank"]),
            torch.cat(scales) if scales else None,
            bias,
            whole["weight_group_scale"],
            type_columns(bias, whole["low_rank"] is not None),
        )
        keep_in_place(*self.weight)


@torch.no_grad()
def join(readers: Sequence[Reader]) -> JoinedLinears | None:
    """Linears on one device as one; `None` where they differ in what a kernel takes for all outputs, or where the blocks of outputs
    that kernels multiply would not lie in one linear each.
    """
    kinds = {(r.weight.device, r.bits, r.group_size, r.type_bias is None) for r in readers}
    if len(kinds) > 1 or any(r.out_features % SCALE_OUTPUTS for r in readers):
        return None
    return JoinedLinears(readers)
