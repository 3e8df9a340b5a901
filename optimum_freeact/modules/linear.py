"""`FreeActLinear`: a linear layer with packed integer weights that reads a [`FreeActInput`]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, SupportsIndex

import torch
from torch import nn

from optimum_freeact.kernels import ops
from optimum_freeact.kernels.dispatch import plan
from optimum_freeact.kernels.native import NativeWeight
from optimum_freeact.kernels.reference import Rows, Weight, in_fours, type_columns
from optimum_freeact.kernels.torch_product import int_linear
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.manners import PICKLE_REFUSED, deepcopy_module, keep_dtypes, keep_in_place
from optimum_freeact.modules.rounded_rows import KernelRows
from optimum_freeact.numerics.affine import dequantize
from optimum_freeact.numerics.byte_rows import column_codes, from_bytes, to_bytes
from optimum_freeact.numerics.byte_rows import group_size as group_size_of
from optimum_freeact.numerics.packing import bytes_per_group, pack, unpack
from optimum_freeact.transforms.affine_map import pick


class FreeActLinear(nn.Linear):
    r"""Computes \\( y = \hat z \hat V^\top + p L^\top + b_k \\) (see `optimum_freeact.transforms.affine_map`).

    It is a subclass of `nn.Linear` so that PEFT and others find it, but has its own storage:

    - `weight` (`uint8`, shape `(out, groups, bytes)`): packed codes of V. Named and shaped so that a program without
      this package fails with a size mismatch instead of running on random weights.
    - `qscale` (`float32`, shape `(out, 1)`): scale of each row's codes; absent at 16 bits.
    - `weight_group_scale` (`int8`, shape `(out, groups)`): -127 to 127, by which a group's codes are multiplied before
      `qscale`; absent where a row is one group.
    - `type_bias` (`float32`, shape `(1, out)`): output bias of token type 0, and `type_shift` (`int8`, at 16 bits
      `float32`, shape `(n_means - 1, out)`) with `type_shift_scale` (`bfloat16`, a number for each group of a row, see
      `optimum_freeact.numerics.byte_rows`): how much more the other types have; absent without bias and centring.
    - `low_rank` (`int8`, shape `(out, r)`) and `low_rank_scale` (`float32`, shape `(r,)`): L; absent at rank 0.

    Args:
        in_features, out_features (`int`): As in `nn.Linear`.
        source ([`FreeActInput`]): The input side, owned by the parent module.
        bits (`int`): 4, 8 or 16.
        group_size (`int`): Columns per group of the weight; `in_features` for one scale per output channel.
        bias (`bool`): Whether there is an output bias (always with centring).
        dtype (`torch.dtype`): Type of a 16-bit weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        source: FreeActInput,
        *,
        bits: int,
        group_size: int,
        bias: bool,
        dtype: torch.dtype = torch.float32,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.weight_dtype = dtype
        self.has_bias = bias
        source.reader_settings.append((bits, None if group_size == in_features else group_size))
        source.readers.append(self)
        self.__dict__["source"] = source  # not registered here: the parent owns it, its tensors are stored once
        self._is_hf_initialized = True
        groups = in_features // group_size
        width = bytes_per_group(group_size, bits, dtype)
        self.weight = nn.Parameter(torch.zeros(out_features, groups, width, dtype=torch.uint8), requires_grad=False)
        self.register_parameter("bias", None)
        self.register_buffer("qscale", torch.ones(out_features, 1) if bits < 16 else None)
        grouped = bits < 16 and groups > 1
        ones = torch.ones(out_features, groups, dtype=torch.int8) if grouped else None
        self.register_buffer("weight_group_scale", ones)
        rows = 1 if source.mean is None else len(source.mean)
        self.register_buffer("type_bias", torch.zeros(1, out_features) if bias or source.mean is not None else None)
        kind = torch.float32 if bits == 16 else torch.int8
        self.register_buffer("type_shift", torch.zeros(rows - 1, out_features, dtype=kind) if rows > 1 else None)
        shared = torch.zeros(rows - 1, out_features // group_size_of(out_features), dtype=torch.bfloat16)
        self.register_buffer("type_shift_scale", shared if rows > 1 and bits < 16 else None)
        rank = 0 if source.basis is None else source.basis.shape[1]
        self.register_buffer("low_rank", torch.zeros(out_features, rank, dtype=torch.int8) if rank else None)
        self.register_buffer("low_rank_scale", torch.ones(rank) if rank else None)
        self._codes: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._row_sum: torch.Tensor | None = None
        self._native: NativeWeight | None = None
        self._bias_rows: torch.Tensor | None = None
        self._type_columns: torch.Tensor | None = None
        self._branch: tuple[torch.Tensor, torch.Tensor] | None = None  # where kernels want it wider than it is stored
        self.span = (0, out_features)  # of the outputs where several linears are one product

    @torch.no_grad()
    def set_weight(
        self, codes: torch.Tensor, scale: torch.Tensor | None, group_scale: torch.Tensor | None = None
    ) -> None:
        """Store codes `(out, groups, group_size)`, scales `(out, 1, 1)` and of groups `(out, groups, 1)`, as in
        `rounding.rtn.RoundedWeight`; at 16 bits values, `None`.
        """
        values = codes.to(self.weight_dtype) if self.bits == 16 else codes
        self.weight.data.copy_(pack(values, self.bits))
        if scale is not None:
            self.qscale.copy_(scale.squeeze(-1))
        if group_scale is not None:
            self.weight_group_scale.copy_(group_scale.squeeze(-1))
        self._codes = self._row_sum = self._native = self.source._joined = None

    @torch.no_grad()
    def set_low_rank(self, branch: torch.Tensor) -> None:
        """Store L of shape `(out, r)`."""
        codes, scale = column_codes(branch)
        self.low_rank.copy_(codes)
        self.low_rank_scale.copy_(scale)
        self.source._joined = None

    @torch.no_grad()
    def set_bias_rows(self, bias: torch.Tensor) -> None:
        """Store output biases of all token types, shape `(n_means or 1, out)`."""
        self.type_bias.copy_(bias[:1])
        if self.type_shift is not None:
            shift = bias[1:] - self.type_bias.to(bias.dtype)
            if self.type_shift_scale is not None:
                shift, scale = to_bytes(shift)
                self.type_shift_scale.copy_(scale)
            self.type_shift.copy_(shift)
        self._bias_rows = self._type_columns = self.source._joined = None

    def bias_rows(self) -> torch.Tensor | None:
        """Output biases of all token types, `float32` of shape `(n_means or 1, out)`, as the layer uses them."""
        if self._bias_rows is not None:
            return self._bias_rows
        if self.type_shift is None:
            return self.type_bias
        scale = self.type_shift_scale
        shift = self.type_shift if scale is None else from_bytes(self.type_shift, scale)
        return torch.cat((self.type_bias, self.type_bias + shift))

    def codes(self) -> torch.Tensor:
        """`int8` codes of shape `(out, in)` (at 16 bits the values of V in their own dtype)."""
        return unpack(self.weight.data, self.bits, self.group_size, self.weight_dtype).flatten(1)

    def transformed_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """V as the layer uses it, dequantized, shape `(out, in)`."""
        if self.bits == 16:
            return self.codes().to(dtype)
        grouped = self.codes().unflatten(-1, (-1, self.group_size)).to(dtype)
        return (grouped * self.group_steps(dtype).unsqueeze(-1)).flatten(1)

    @contextmanager
    def values_at_hand(self) -> Iterator[None]:
        """While it lasts the dequantized weight is kept, for a run of many batches."""
        self._values = self.transformed_weight()
        try:
            yield
        finally:
            self._values = None

    def group_steps(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Effective scale of each group, shape `(out, groups)`."""
        qscale = self.qscale.to(dtype)
        return qscale if self.weight_group_scale is None else qscale * self.weight_group_scale.to(dtype)

    def prepare(self) -> None:
        """Make what the product on this device needs: sums of rows for kernels, which read the packed codes; for torch
        codes as `int8` rows (one byte a weight), so that a forward need not unpack nibbles.
        """
        self.forget()
        if self.weight.device.type != "meta":
            self._bias_rows = self.bias_rows()
        if self.bits == 16 or self.weight.device.type == "meta":
            return
        group_size = None if self.group_size == self.in_features else self.group_size
        chosen = plan(
            self.weight.device,
            weight_bits=self.bits,
            activation_bits=self.source.bits,
            group_size=group_size,
            transform=self.source.transform,
            activation_group_size=self.source.group_size,
            width=self.in_features,
            masked=self.source.masked,
        )
        if chosen.name == "torch" and group_size is not None:
            return
        codes = self.codes()
        self._row_sum = codes.sum(1, dtype=torch.int32)
        if chosen.name == "torch":
            self._codes = codes
        elif chosen.name == "triton":
            ops.make_ready(self.weight.device)
            self._type_columns = type_columns(self._bias_rows, self.low_rank is not None)
            if self.low_rank is not None and self.low_rank.shape[1] % 4:
                self._branch = in_fours(self.low_rank), in_fours(self.low_rank_scale)
            keep_in_place(self._row_sum, self._bias_rows, self._type_columns, *(self._branch or ()))
            self.source.join_readers()
        else:
            self._native = NativeWeight(self.kernel_weight(), self.weight_group_scale)

    @property
    def is_joinable(self) -> bool:
        """Whether the layer is prepared for Triton's kernels."""
        return self._row_sum is not None and self._codes is None and self._native is None

    def forget(self) -> None:
        """What was made of the stored tensors is no longer theirs."""
        self._codes = self._row_sum = self._native = self._bias_rows = self._type_columns = self._branch = None
        self.source._joined = None

    def kernel_weight(self) -> Weight:
        """What is stored, as kernels read it; the packed codes are not copied."""
        row_sum = self.codes().sum(1, dtype=torch.int32) if self._row_sum is None else self._row_sum
        branch = (self.low_rank, self.low_rank_scale) if self._branch is None else self._branch
        return Weight(
            self.weight.data.flatten(1),
            self.qscale.flatten(),
            row_sum,
            *branch,
            self.bias_rows(),
            self.weight_group_scale,
            self._type_columns,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of shape `(..., in_features)`, any floating dtype; returns `(..., out_features)` in the same dtype."""
        if self._native is not None:
            y = self.source.native_output(x, self)
            if y is not None:
                return y
        rounded = self.source(x)
        if isinstance(rounded, KernelRows):
            return self._kernel_product(rounded, x.dtype)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if rounded.qparams is None or self.bits == 16 or self.group_size != self.in_features:
            values = rounded.values
            values = values if rounded.qparams is None else dequantize(values, rounded.qparams)
            weight = self.transformed_weight(dtype) if self._values is None else self._values.to(dtype)
            y = nn.functional.linear(values.to(dtype), weight)
        else:
            y = self._integer_product(rounded, dtype)
        if rounded.low_rank is not None:
            y = y + (rounded.low_rank * self.low_rank_scale.to(dtype)) @ self.low_rank.to(dtype).mT
        biases = self.bias_rows()
        if biases is not None:
            y = y + pick(biases.to(dtype), rounded.types)
        return y.to(x.dtype)

    def _kernel_product(self, rows: KernelRows, dtype: torch.dtype) -> torch.Tensor:
        if rows.native:
            weight = NativeWeight(self.kernel_weight(), self.weight_group_scale)
            y = weight.linear(Rows(rows.codes, rows.stats, rows.branch), rows.types, dtype, self.source.group_size)
        else:
            y = self._joined_output(rows, dtype)
            if y is None:
                y = ops.w4_linear(*rows[:4], *self.kernel_weight(), dtype)
        return y.view(*rows.shape, self.out_features)

    def _joined_output(self, rows: KernelRows, dtype: torch.dtype) -> torch.Tensor | None:
        """This layer's part of one product for all that read the rows, which the first of them makes."""
        joined = self.source._joined
        if joined is None or rows.outputs is None:
            return None
        if not rows.outputs:
            rows.outputs.append(ops.w4_linear(*rows[:4], *joined.weight, dtype))
        return rows.outputs[0][:, slice(*self.span)]

    def _integer_product(self, rounded, dtype: torch.dtype) -> torch.Tensor:
        """(scale q + offset) V^T = (scale (q codes^T) + offset rowsum(codes)) qscale, the product over integers."""
        codes = self.codes() if self._codes is None else self._codes
        flat = rounded.values.reshape(-1, self.in_features)
        product = int_linear(flat, codes).to(dtype).view(*rounded.values.shape[:-1], self.out_features)
        y = product * rounded.qparams.scale
        if rounded.qparams.offset is not None:
            row_sum = codes.sum(1, dtype=torch.int32) if self._row_sum is None else self._row_sum
            y = y + rounded.qparams.offset * row_sum.to(dtype)
        return y * self.qscale.to(dtype).squeeze(-1)

    @torch.no_grad()
    def dequantized(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Plain weight `(out, in)` and bias `(out,)` (float32) that give the same layer, less activation rounding.

        With several token types the bias is type 0's: a plain linear has only one.
        """
        source = self.source.input_map(torch.float64)
        branch = None if self.low_rank is None else self.low_rank.double() * self.low_rank_scale.double()
        weight = source.restore_weight(self.transformed_weight(torch.float64), branch)  # as text reads it
        bias = None if self.type_bias is None else self.type_bias[0].double()
        if source.mean is not None:
            bias = bias - weight @ source.mean[0]
        return weight.float(), None if bias is None else bias.float()

    def __deepcopy__(self, memo: dict) -> FreeActLinear:
        return deepcopy_module(self, memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:  # noqa: ARG002
        raise TypeError(PICKLE_REFUSED.format(type(self).__name__))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._row_sum is not None or self._bias_rows is not None:
            self.prepare()

    def _apply(self, fn, recurse: bool = True) -> FreeActLinear:
        prepared = self._row_sum is not None or self._bias_rows is not None
        self.forget()
        result = keep_dtypes(self, super()._apply, fn, recurse)
        if prepared:
            self.prepare()
        return result

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        groups = "" if self.group_size == self.in_features else f", group_size={self.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}{groups}"
