"""Embeddings and output head in one signed byte a number, with one scale a row.

A row's scale is stored in the model's own type and made before the codes, so that codes times scale is what the row stands for,
whoever computes it. Tied embeddings stay tied: head and embedding hold the same codes.
"""

from __future__ import annotations

from typing import NoReturn, SupportsIndex

import torch
from torch import nn

from optimum_freeact.kernels import ops
from optimum_freeact.modules.manners import PICKLE_REFUSED, deepcopy_module
from optimum_freeact.numerics.finite import all_finite


ALIGNMENT = 64  # bytes
CHUNK_BYTES = 1 << 26  # of a weight that is made plain at a time


def row_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`int8` codes `(rows, 1, columns)` of a weight and scales `(rows, 1)` in its type; a row of zeros has scale one.

    Raises:
        `ValueError`: if the weight is not finite.
    """
    if not all_finite(weight):
        raise ValueError("The embeddings hold NaN or infinity, which have no 8-bit form: check the checkpoint.")
    scale = weight.detach().abs().amax(1, keepdim=True).float() / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).to(weight.dtype)
    scale = torch.where(scale > 0, scale, torch.finfo(weight.dtype).tiny)  # of a row that its type holds barely
    codes = (weight.detach().float() / scale.float()).round_().clamp_(-127, 127)
    return codes.to(torch.int8).unsqueeze(1), scale


class _ByteRows(nn.Module):
    """What both have in common: `weight` (`int8`, shape `(rows, 1, columns)`, which no plain weight has) and `qscale`."""

    weight: nn.Parameter
    qscale: torch.Tensor

    def _make(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._is_hf_initialized = True
        self._aligned = False
        self._unit: torch.Tensor | None = None
        self.weight = nn.Parameter(torch.zeros(rows, 1, columns, dtype=torch.int8), requires_grad=False)
        self.register_buffer("qscale", torch.ones(rows, 1, dtype=dtype))

    def prepare(self) -> None:
        """On a CPU, move codes that a file left anywhere to where torch's product with bytes may read them: at other addresses
        it crashes.
        """
        if self.weight.device.type == "cpu" and self.weight.data_ptr() % ALIGNMENT:
            self.weight.data = self.weight.data.clone()
        on_cpu = self.weight.device.type == "cpu" and self.weight.shape[2] % ALIGNMENT == 0  # rows of the input, too
        self._aligned = on_cpu and self.weight.data_ptr() % ALIGNMENT == 0
        self._unit = torch.ones_like(self.qscale.flatten()) if self._aligned else None

    def _apply(self, fn, recurse: bool = True) -> _ByteRows:
        result, before = super()._apply(fn, recurse), self._aligned
        if before:
            self.prepare()
        return result

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._aligned = False

    @torch.no_grad()
    def plain(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that is stood for."""
        return self.weight.data.flatten(1).to(dtype) * self.qscale.to(dtype)

    def __deepcopy__(self, memo: dict) -> _ByteRows:
        return deepcopy_module(self, memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:  # noqa: ARG002
        raise TypeError(PICKLE_REFUSED.format(type(self).__name__))


class FreeActEmbedding(_ByteRows, nn.Embedding):
    """An embedding with rows of bytes.

    Args:
        num_embeddings, embedding_dim, padding_idx: As in `nn.Embedding`.
        dtype (`torch.dtype`): Type of the scales, and of what comes out.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._make(num_embeddings, embedding_dim, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of `ids`, any shape, in the type of the scales."""
        rows = self.weight[:, 0].index_select(0, ids.reshape(-1))
        scale = self.qscale.index_select(0, ids.reshape(-1))
        return (rows.to(scale.dtype) * scale).view(*ids.shape, self.embedding_dim)


class FreeActHead(_ByteRows, nn.Linear):
    """An output head with rows of bytes. Its input is not rounded.

    Args:
        in_features, out_features (`int`), bias (`bool`): As in `nn.Linear`.
        dtype (`torch.dtype`): Type of the scales and the bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._make(out_features, in_features, dtype)
        zeros = torch.zeros(out_features, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(zeros, requires_grad=False) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of shape `(..., in_features)`; returns `(..., out_features)` in its type."""
        codes, scale = self.weight.data.flatten(1), self.qscale.data.flatten()
        flat = x.reshape(-1, self.in_features)
        if ops.serves_w8(flat):
            y = ops.w8_linear(flat.contiguous(), codes, scale)
        elif self._aligned and flat.dtype != torch.float64 and not (torch.is_grad_enabled() and x.requires_grad):
            unit = self._unit  # a tensor that lies there: Inductor takes no other
            if unit is None or unit.dtype != x.dtype:
                unit = torch.ones_like(scale, dtype=x.dtype)
            y = torch._weight_int8pack_mm(flat.contiguous(), codes, unit) * scale
        else:
            y = self._in_parts(flat, codes, scale)
        y = y.to(x.dtype) if self.bias is None else (y + self.bias).to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _in_parts(self, flat: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """For many rows, and where gradients are wanted: a part of the weight made plain at a time."""
        rows = max(1, CHUNK_BYTES // (self.in_features * flat.element_size()))
        parts = [
            nn.functional.linear(flat, part.to(flat.dtype)) * s
            for part, s in zip(codes.split(rows), scale.split(rows), strict=True)
        ]
        return torch.cat(parts, dim=-1)


def find_embeddings(model: nn.Module) -> tuple[str, str | None]:
    """Names of a model's input embeddings and output head; no head for a model without one.

    Raises:
        `ValueError`: if they are of another kind than plain embeddings and linears.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, plain in ((embedding, nn.Embedding), (head, nn.Linear)):
        if module is not None and type(module) is not plain:
            raise ValueError(
                f"embedding_bits=8 knows nn.Embedding and nn.Linear; this model has {type(module).__name__} in their place, "
                "which computes something of its own: use embedding_bits=16."
            )
    if embedding.max_norm is not None:
        raise ValueError(
            "embedding_bits=8 knows no embeddings with max_norm, which change when they are read: use 16."
        )
    return names[id(embedding)], None if head is None else names[id(head)]


def replace_embeddings(model: nn.Module, device: torch.device | str | None = None) -> None:
    """Put rows of bytes in the place of embeddings and head: empty ones on `device`, or with the model's own numbers."""
    name, head_name = find_embeddings(model)
    old, old_head = model.get_submodule(name), None if head_name is None else model.get_submodule(head_name)
    dtype, tied = old.weight.dtype, old_head is not None and old_head.weight is old.weight
    with torch.device(device or old.weight.device):
        new = FreeActEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx, dtype)
        head = None
        if old_head is not None:
            head = FreeActHead(old_head.in_features, old_head.out_features, old_head.bias is not None, dtype)
    pairs = [(new, old)] if head is None or (tied and device is None) else [(new, old), (head, old_head)]
    if device is None:
        for made, plain in pairs:
            codes, scale = row_codes(plain.weight)
            made.weight.data.copy_(codes)
            made.qscale.copy_(scale)
        if head is not None and old_head is not None and head.bias is not None:
            head.bias.data.copy_(old_head.bias)
    if tied and head is not None:
        head.weight = new.weight
        head.qscale.copy_(new.qscale)
    model.set_submodule(name, new.train(old.training))
    if head is not None and old_head is not None:
        model.set_submodule(head_name, head.train(old_head.training))


def restore_embeddings(model: nn.Module, dtype: torch.dtype) -> None:
    """Plain embeddings and head again, in place."""
    new, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(new, FreeActEmbedding):
        return
    names = {id(module): name for name, module in model.named_modules()}
    plain = nn.Embedding(
        new.num_embeddings, new.embedding_dim, new.padding_idx, _weight=new.plain(dtype), device=new.weight.device
    )
    model.set_submodule(names[id(new)], plain.train(new.training))
    if isinstance(head, FreeActHead):
        linear = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
        linear.weight = plain.weight if head.weight is new.weight else nn.Parameter(head.plain(dtype))
        if head.bias is not None:
            linear.bias = nn.Parameter(head.bias.data.to(dtype))
        model.set_submodule(names[id(head)], linear.train(head.training))
