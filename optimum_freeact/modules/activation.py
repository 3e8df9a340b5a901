"""The input side of quantized linears: centre, transform and round once, for all linears that read the same tensor."""

from __future__ import annotations

import weakref
from typing import NoReturn, SupportsIndex

import torch
from torch import nn

from optimum_freeact.kernels import native_ops, ops
from optimum_freeact.kernels.dispatch import plan
from optimum_freeact.kernels.native import NativeSide
from optimum_freeact.kernels.tables import InputTables, make_native_tables, make_tables
from optimum_freeact.modules.joined import JoinedLinears, join
from optimum_freeact.modules.manners import PICKLE_REFUSED, deepcopy_module, keep_dtypes, keep_in_place
from optimum_freeact.modules.rounded_rows import KernelRows, RoundedInput
from optimum_freeact.numerics.affine import choose_qparams, dequantize, fake_quantize_ste, round_codes
from optimum_freeact.numerics.byte_rows import column_codes
from optimum_freeact.numerics.kronecker import factor_pair
from optimum_freeact.transforms.affine_map import InputMap, pick
from optimum_freeact.type_state import TypeState


class FreeActInput(nn.Module):
    """Centring per token type, channel scale, low-rank split, transform and per-token rounding of one input.

    It is registered once beside the linears that share the input (as `<first linear>_input`) and referenced by all of
    them, so its tensors are stored once and its work is done once per forward.

    Args:
        in_features (`int`): d.
        n_types (`int`): Token types known to the model.
        n_means (`int`): 0 (no centring), 1 (shared) or `n_types`.
        channel_scale (`bool`): Whether there is a scale per channel.
        rank (`int`): Columns of the high-precision basis; 0 for none.
        transform (`str`): `"none"`, `"hadamard"`, `"kronecker"` or `"orthogonal"`.
        bits (`int`): 4, 8 or 16.
        symmetric (`bool`): Symmetric or asymmetric grid per token.
        n_readers (`int`): How many linears read the result (frees the cached codes after the last).
        state ([`TypeState`]): Where the current types are found.
        group_size (`int`, *optional*): Entries per grid; one grid per token by default.
        masked (`bool`, *optional*, defaults to `False`): Whether some coordinates belong to single types.
        n_left_out (`int`, *optional*, defaults to 0): Directions that single types leave out.
        type_rank (`int`, *optional*, defaults to 0): Further columns of the basis for each type alone.
    """

    def __init__(
        self,
        in_features: int,
        *,
        n_types: int,
        n_means: int,
        channel_scale: bool,
        rank: int,
        transform: str,
        bits: int,
        symmetric: bool,
        n_readers: int,
        state: TypeState,
        group_size: int | None = None,
        masked: bool = False,
        n_left_out: int = 0,
        type_rank: int = 0,
    ):
        super().__init__()
        self.in_features, self.bits, self.symmetric, self.n_readers = in_features, bits, symmetric, n_readers
        self.transform, self.group_size = transform, group_size
        self.state = state
        self._last: tuple | None = None
        self._tables: InputTables | None = None
        self._native: NativeSide | None = None
        self._joined: JoinedLinears | None = None
        self._prepared = self._offloaded = False
        self.reader_settings: list[tuple[int, int | None]] = []  # bits and group size of each linear
        self.readers: list = []  # the linears
        self._is_hf_initialized = True  # transformers must not initialise these tensors: they are always loaded
        self.register_buffer("clip", torch.ones(n_types))
        # bfloat16 is enough: the output biases are computed from the stored (rounded) means, so centring stays exact
        self.register_buffer("mean", torch.zeros(n_means, in_features, dtype=torch.bfloat16) if n_means else None)
        self.register_buffer("channel_scale", torch.ones(in_features) if channel_scale else None)
        # one byte a number: z and L are computed from the stored basis, so rounding it costs no exactness
        rank += n_types * type_rank
        self.register_buffer("uses", torch.ones(n_types, rank, dtype=torch.bool) if type_rank else None)
        self.register_buffer("basis", torch.zeros(in_features, rank, dtype=torch.int8) if rank else None)
        self.register_buffer("basis_scale", torch.ones(rank) if rank else None)
        a, b = factor_pair(in_features)
        factored, dense = transform in ("hadamard", "kronecker"), transform == "orthogonal"
        # flat rotations have one magnitude throughout: rounded, they are the same up to a factor
        kind = torch.bfloat16 if transform == "hadamard" else torch.float32
        self.register_buffer("left", torch.eye(a, dtype=kind) if factored else None)
        self.register_buffer("right", torch.eye(b, dtype=kind) if factored else None)
        self.register_buffer("dense", torch.eye(in_features) if dense else None)
        self.register_buffer("keep", torch.ones(n_types, in_features, dtype=torch.bool) if masked else None)
        self.add_left_out(n_left_out)

    def input_map(self, dtype: torch.dtype = torch.float32) -> InputMap:
        """The stored map as an [`InputMap`] in `dtype`."""
        names = ("mean", "channel_scale", "left", "right", "dense", "keep", "left_out", "leaves_out", "uses")
        found = InputMap(**{n: None if getattr(self, n) is None else getattr(self, n).to(dtype) for n in names})
        if self.basis is not None:
            found.basis = self.basis.to(dtype) * self.basis_scale.to(dtype)
        return found

    def add_left_out(self, n: int) -> None:
        """Make room for `n` directions that single types leave out; how many is known only after the fit."""
        device = self.clip.device
        directions = torch.zeros(self.in_features, n, dtype=torch.bfloat16, device=device) if n else None
        self.register_buffer("left_out", directions)
        whose = torch.zeros(len(self.clip), n, dtype=torch.bool, device=device) if n else None
        self.register_buffer("leaves_out", whose)

    def forget(self) -> None:
        """What was made of the stored tensors is no longer theirs."""
        self._tables = self._native = self._joined = None

    @torch.no_grad()
    def store(self, found: InputMap) -> None:
        """Write a map into the buffers, rounded to their types."""
        self.forget()
        for name, value in vars(found).items():
            if value is not None and name != "basis":
                getattr(self, name).copy_(value)
        if found.basis is not None:
            codes, scale = column_codes(found.basis)
            self.basis.copy_(codes)
            self.basis_scale.copy_(scale)

    @property
    def masked(self) -> bool:
        """Whether token types differ in more than means and clips."""
        return self.keep is not None or self.left_out is not None or self.uses is not None

    def prepare(self) -> None:
        """Choose what runs on the device where the tensors are, and make the tables that a kernel reads."""
        self._prepared, self._tables, self._native, self._joined, self._last = True, None, None, None, None
        self._offloaded = self.clip.device.type == "meta"
        if self._offloaded or not self.reader_settings:
            return
        plans = {
            plan(
                self.clip.device,
                weight_bits=bits,
                activation_bits=self.bits,
                group_size=group_size,
                transform=self.transform,
                activation_group_size=self.group_size,
                width=self.in_features,
                masked=self.masked,
            ).name
            for bits, group_size in set(self.reader_settings)
        }
        stored = (self.input_map(), self.basis, self.basis_scale, self.clip, self.bits, self.symmetric)
        if plans == {"triton"}:
            grouped = any(group_size is not None for _, group_size in self.reader_settings)
            self._tables = make_tables(*stored, self.group_size or (self.in_features if grouped else 0))
            if self._tables.one_pass:
                ops.check_pass(self.clip.device)
            keep_in_place(*self._tables.tensors())
            self.join_readers()
        elif plans == {"native"}:
            self._native = NativeSide(make_native_tables(*stored), self.group_size)

    def join_readers(self) -> None:
        """Make one product of the linears' once the last of them is prepared."""
        self._joined = None
        if (
            self._tables is not None
            and self.n_readers == len(self.readers) > 1
            and all(r.is_joinable for r in self.readers)
        ):
            self._joined = join(self.readers)

    def forward(self, x: torch.Tensor) -> RoundedInput | KernelRows:
        """Round rows `x` of shape `(..., in_features)`; the linears of one group get the same object."""
        versioned = torch.compiler.is_compiling() or not x.is_inference()  # else a change of x would not be seen
        if self.n_readers == 1 or not versioned or (torch.is_grad_enabled() and x.requires_grad):
            return self._round(x)
        last, self._last = self._last, None
        if last is not None and self._same(last, x):
            result, left = last[2], last[3] - 1
        else:
            result, left = self._round(x), self.n_readers - 1
            if self._joined is not None and isinstance(result, KernelRows):
                result = result._replace(outputs=[])
        if left:
            tracing = torch.compiler.is_compiling()
            self._last = (x, 0, result, left) if tracing else (weakref.ref(x), x._version, result, left)
        return result

    @staticmethod
    def _same(last: tuple, x: torch.Tensor) -> bool:
        """Whether the kept codes are those of `x`. A traced tensor has no weak references; its trace ends with the call."""
        if torch.compiler.is_compiling():
            return last[0] is x
        return isinstance(last[0], weakref.ref) and last[1] == x._version and last[0]() is x

    def _round(self, x: torch.Tensor) -> RoundedInput | KernelRows:
        if self._offloaded and self.clip.device.type != "meta":  # here for this call only
            self.prepare()
            try:
                return self._round(x)
            finally:
                self._tables, self._native, self._joined, self._offloaded = None, None, None, True
        if (self._tables is not None or self._native is not None) and self._kernel_serves(x):
            return self._kernel_rows(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        types = self.state.of(x) if len(self.clip) > 1 else None
        z, low_rank = self.input_map(dtype).apply(x.to(dtype), types)
        if self.bits >= 16:
            return RoundedInput(z, None, low_rank, types)
        clip = pick(self.clip.to(dtype).unsqueeze(-1), types)
        if self.group_size is not None:
            return RoundedInput(self._round_groups(z, clip), None, low_rank, types)
        qparams = choose_qparams(z, self.bits, self.symmetric, clip)
        if torch.is_grad_enabled() and z.requires_grad:
            return RoundedInput(fake_quantize_ste(z, qparams, self.bits), None, low_rank, types)
        return RoundedInput(round_codes(z, qparams, self.bits).to(torch.int8), qparams, low_rank, types)

    def _round_groups(self, z: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        """Values of the codes: a product over groups with grids of their own is one in floating point."""
        groups, clip = z.unflatten(-1, (-1, self.group_size)), clip.unsqueeze(-2) if clip.dim() > 1 else clip
        qparams = choose_qparams(groups, self.bits, self.symmetric, clip)
        if torch.is_grad_enabled() and z.requires_grad:
            return fake_quantize_ste(groups, qparams, self.bits).flatten(-2)
        return dequantize(round_codes(groups, qparams, self.bits), qparams).flatten(-2)

    def _kernel_serves(self, x: torch.Tensor) -> bool:
        """Whether a kernel takes these rows: of the device's types, and no gradient wanted."""
        if torch.is_grad_enabled() and x.requires_grad:
            return False
        kinds = (torch.bfloat16, torch.float16) if x.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
        return x.dtype in kinds

    def _kernel_rows(self, x: torch.Tensor) -> KernelRows:
        types = self.state.of(x) if len(self.clip) > 1 else None
        types = None if types is None else types.reshape(-1)
        flat = x.reshape(-1, self.in_features).contiguous()
        if self._native is not None:
            return KernelRows(*self._native.round_rows(flat, types), types, x.shape[:-1], True)
        tables = self._tables
        assert tables is not None
        if torch.compiler.is_compiling():
            sizes = (tables.a, tables.b, self.bits, self.symmetric, tables.group)
            found = ops.round_rows(flat, types, *tables.tensors(), *sizes)
        else:
            found = ops.rounded(flat, types, tables)
        return KernelRows(*found, types, x.shape[:-1])

    def native_output(self, x: torch.Tensor, reader) -> torch.Tensor | None:
        """Output of one linear by the kernel in C, made in one call with those of the others that read `x`; `None` where it
        does not serve.
        """
        if self._native is None or not self._kernel_serves(x):
            return None
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version and id(reader) in last[2]:
            found = last[2].pop(id(reader))
            if not last[2]:
                self._last = None
            return found
        types = self.state.of(x) if len(self.clip) > 1 else None
        if torch.compiler.is_compiling():
            return native_ops.linear(x, types, self._native, reader._native)
        together = self.n_readers > 1 and not x.is_inference() and all(r._native is not None for r in self.readers)
        if not together:
            return self._native.linears(x, types, [reader._native])[0]
        made = self._native.linears(x, types, [r._native for r in self.readers])
        outputs = {id(r): y for r, y in zip(self.readers, made, strict=True)}
        found = outputs.pop(id(reader))
        self._last = (weakref.ref(x), x._version, outputs)
        return found

    def __deepcopy__(self, memo: dict) -> FreeActInput:
        self._last = None
        joined, self._joined = self._joined, None  # the copies' weights are where they are until they are prepared
        clone = deepcopy_module(self, memo)
        self._joined = joined
        return clone

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:  # noqa: ARG002
        raise TypeError(PICKLE_REFUSED.format(type(self).__name__))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._prepared:
            self.prepare()

    def _apply(self, fn, recurse: bool = True) -> FreeActInput:
        self._tables = self._native = self._joined = None
        result = keep_dtypes(self, super()._apply, fn, recurse)
        if self._prepared:
            self.prepare()
        return result

    def extra_repr(self) -> str:
        """Sizes and kinds, for `print(model)`."""
        rank = 0 if self.basis is None else self.basis.shape[1]
        means = 0 if self.mean is None else len(self.mean)
        grid = "sym" if self.symmetric else "asym"
        return f"{self.in_features}, bits={self.bits} {grid}, transform={self.transform}, means={means}, rank={rank}"
