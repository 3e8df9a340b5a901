"""What the input side of quantized linears hands to them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from optimum_freeact.numerics.affine import QParams


class RoundedInput(NamedTuple):
    """What a `FreeActInput` hands to its linears.

    Args:
        values (`torch.Tensor` of shape `(..., d)`): `int8` codes, or floating-point values at 16 bits or under grad.
        qparams ([`QParams`], *optional*): Scale and offset per row, `None` where `values` are no codes.
        low_rank (`torch.Tensor` of shape `(..., r)`, *optional*): High-precision coordinates.
        types (`torch.Tensor` of shape `(...)`, *optional*): Token types of the rows.
    """

    values: torch.Tensor
    qparams: QParams | None
    low_rank: torch.Tensor | None
    types: torch.Tensor | None


class KernelRows(NamedTuple):
    """What a `FreeActInput` hands to its linears where kernels serve: see `kernels.reference.Rows`.

    Args:
        codes (`int8`, shape `(n, d)`), stats (`float32`, shape `(3, n)`), branch (`float32`, shape `(n, padded r)`): As
            there.
        types (`torch.Tensor` of shape `(n,)`, *optional*): Token types.
        shape (`torch.Size`): Leading shape of the input, whose product is n.
        native (`bool`): Whether they are for the kernel in C (an offloaded layer's, which cannot be one call).
        outputs (`list`, *optional*): Where the first linear leaves the outputs of all that read these rows, if they are one product.
    """

    codes: torch.Tensor
    stats: torch.Tensor
    branch: torch.Tensor
    types: torch.Tensor | None
    shape: torch.Size
    native: bool = False
    outputs: list | None = None
