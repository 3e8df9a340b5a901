"""The kernels as torch operators: opaque to `torch.compile`, safe in CUDA graphs, and never the end of a forward.

A kernel that does not compile or launch is replaced by its reference for the rest of the process, with one warning that
names it. Running out of memory is no such failure and is passed on.
"""

from __future__ import annotations

import logging
import threading
from importlib import import_module

import torch
from torch import Tensor

from optimum_freeact.kernels import reference
from optimum_freeact.kernels.dispatch import (
    DP4A_ROWS,
    STREAM,
    hopper_kernel,
    hopper_rounding,
    is_hopper,
    triton_obstacle,
    wanted,
)
from optimum_freeact.kernels.tables import InputTables, branch_width


logger = logging.getLogger(__name__)

PASS, HOPPER_PASS = "round_pass", "round_pass_hopper"
_failed: dict[str, str] = {}
_lock = threading.Lock()


def failures() -> dict[str, str]:
    """Kernels that failed in this process, and how."""
    return dict(_failed)


def make_ready(device: torch.device) -> None:
    """Allocate what the kernels keep on a device, before any CUDA graph is captured there, and have the product that streams its
    weight compared with its specification, once; where it is wrong, Triton's takes its place.
    """
    if device.type != "cuda" or "w4_linear[many]" in _failed:
        return
    from optimum_freeact.kernels.epilogue_triton import counters

    counters(device)
    if STREAM in _failed or not is_hopper(device.index):
        return
    from optimum_freeact.kernels.self_check import stream_obstacle

    obstacle = stream_obstacle(device.index)
    if obstacle is not None:
        _fail(STREAM, obstacle)


def check_pass(device: torch.device) -> None:
    """Have rounding in one pass compared with its specification, once; where it is wrong, another kernel takes its place."""
    if device.type != "cuda":
        return
    from optimum_freeact.kernels.self_check import pass_obstacle

    names = {PASS: "rounding_pass_triton"}
    if is_hopper(device.index):
        names[HOPPER_PASS] = "rounding_pass_hopper"
    for name, module in names.items():
        obstacle = None if name in _failed else pass_obstacle(device.index, module)
        if obstacle is not None:
            _fail(name, obstacle)


def _fail(name: str, reason: str) -> None:
    """Remember a failure, and say it once."""
    with _lock:
        if name not in _failed:
            _failed[name] = reason
            logger.warning(
                "The kernel %s failed (%s); another takes its place from here on, at a loss of speed only. "
                "FREEACT_KERNELS=torch avoids the attempt.",
                name,
                reason,
            )


def _attempt(name: str, kernel, fallback):
    """`kernel()`, or from its first failure on `fallback()`."""
    if name not in _failed:
        try:
            return kernel()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises
            _fail(name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
    return fallback()


def _in_one_pass(module: str, x: Tensor, types: Tensor | None, tables: InputTables) -> reference.Rows:
    return import_module(f"optimum_freeact.kernels.{module}").round_rows(x, types, tables)


def _round_rows(
    x: Tensor,
    types: Tensor | None,
    mean: Tensor | None,
    channel_scale: Tensor | None,
    basis: Tensor | None,
    basis_scale: Tensor | None,
    left: Tensor,
    right: Tensor,
    clip: Tensor,
    factor: Tensor,
    mean_branch: Tensor | None,
    reach: Tensor | None,
    a: int,
    b: int,
    bits: int,
    symmetric: bool,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.round_rows` of `x` `(n, d)`; the branch has no columns where there is none."""
    tensors = (mean, channel_scale, basis, basis_scale, left, right, clip, factor, mean_branch, reach)
    return rounded(x, types, InputTables(*tensors, a, b, bits, symmetric, group))


def rounded(x: Tensor, types: Tensor | None, tables: InputTables) -> tuple[Tensor, Tensor, Tensor]:
    """[`round_rows`] by tables that need not be taken apart, where no graph is traced."""
    size = f"[{tables.a}x{tables.b}]"

    def plain() -> reference.Rows:
        rows = reference.round_rows(
            x, types, tables.input_map(), tables.clip, tables.bits, tables.symmetric, tables.branch, group=tables.group
        )
        return reference.marked(rows, types, tables.rank, tables.n_means)

    def three_launches() -> reference.Rows:
        from optimum_freeact.kernels import rounding_triton

        return rounding_triton.round_rows(x, types, tables)

    def any_gpu() -> reference.Rows:
        if tables.one_pass and PASS not in _failed:
            return _attempt(PASS + size, lambda: _in_one_pass("rounding_pass_triton", x, types, tables), in_three)
        return in_three()

    def in_three() -> reference.Rows:
        return _attempt("round_rows" + size, three_launches, plain)

    if HOPPER_PASS not in _failed and hopper_rounding(x, tables):
        rows = _attempt(HOPPER_PASS + size, lambda: _in_one_pass("rounding_pass_hopper", x, types, tables), any_gpu)
    else:
        rows = any_gpu()
    return (
        rows.codes,
        rows.stats,
        x.new_zeros((len(x), 0), dtype=torch.float32) if rows.branch is None else rows.branch,
    )


round_rows_op = torch.library.custom_op("freeact::round_rows", _round_rows, mutates_args=())


@round_rows_op.register_fake
def _(x, types, mean, channel_scale, basis, basis_scale, left, right, clip, *others):  # noqa: ARG001
    n, d = x.shape
    group = others[-1]
    rank = 0 if basis_scale is None else basis_scale.shape[0]
    width = branch_width(rank, clip.shape[0]) if rank else 0
    return (
        x.new_empty((n, d), dtype=torch.float16 if group else torch.int8),
        x.new_empty((1 if group else 3, n), dtype=torch.float32),
        x.new_empty((n, width), dtype=torch.float32),
    )


def _on_gpu(rows: reference.Rows, types: Tensor | None, weight: reference.Weight, out_dtype: torch.dtype) -> Tensor:
    """The kernel for this number of rows on this GPU; one that fails gives way to those that run on any."""
    n, d = rows.codes.shape

    def plain() -> Tensor:
        from optimum_freeact.kernels import dp4a_triton, groups_gemv_triton, w4_groups_triton, w4_triton

        if rows.codes.is_floating_point() and n == 1:
            return groups_gemv_triton.w4_linear(rows, types, weight, out_dtype)
        if rows.codes.is_floating_point():
            return w4_groups_triton.w4_linear(rows, types, weight, out_dtype)
        few = 0 < n <= DP4A_ROWS and d % 8 == 0
        return (dp4a_triton if few else w4_triton).w4_linear(rows, types, weight, out_dtype)

    name = hopper_kernel(rows, weight, out_dtype)
    if name is None:
        return plain()

    def own() -> Tensor:
        module = import_module(f"optimum_freeact.kernels.{name}")
        return module.w4_linear(rows, types, weight, out_dtype)

    return _attempt(name, own, plain)


def _w4_linear(
    codes: Tensor,
    stats: Tensor,
    branch: Tensor,
    types: Tensor | None,
    packed: Tensor,
    qscale: Tensor,
    row_sum: Tensor,
    low_rank: Tensor | None,
    low_rank_scale: Tensor | None,
    type_bias: Tensor | None,
    group_scale: Tensor | None,
    type_columns: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`reference.w4_linear` of rounded rows; `(n, m)`."""
    rows = reference.Rows(codes, stats, branch if branch.shape[1] else None)
    weight = reference.Weight(packed, qscale, row_sum, low_rank, low_rank_scale, type_bias, group_scale, type_columns)
    kind = "groups" if codes.is_floating_point() else "few" if len(codes) <= DP4A_ROWS else "many"
    return _attempt(
        f"w4_linear[{kind}]",
        lambda: _on_gpu(rows, types, weight, out_dtype),
        lambda: reference.w4_linear(rows, types, weight, out_dtype),
    )


w4_linear_op = torch.library.custom_op("freeact::w4_linear", _w4_linear, mutates_args=())


@w4_linear_op.register_fake
def _(codes, stats, branch, types, packed, qscale, row_sum, low_rank, scale, bias, group_scale, columns, out_dtype):  # noqa: ARG001
    return codes.new_empty((codes.shape[0], packed.shape[0]), dtype=out_dtype)


def round_rows(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The operator where a graph is traced, else what is in it: an operator's own cost is that of a small kernel."""
    return (round_rows_op if torch.compiler.is_compiling() else _round_rows)(*args)


def w4_linear(*args) -> Tensor:
    """As [`round_rows`]."""
    return (w4_linear_op if torch.compiler.is_compiling() else _w4_linear)(*args)


W8_ROWS = 64  # above, a plain weight is made once for many rows


def serves_w8(x: Tensor) -> bool:
    """Whether the kernel for weights of bytes takes these rows; `FREEACT_KERNELS=torch` switches it off."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or not 0 < len(x) <= W8_ROWS:
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    return wanted() in ("auto", "triton") and triton_obstacle(x.device.index) is None


def _w8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows `(n, d)` times an `int8` weight `(m, d)` with scales `(m,)`; `(n, m)`."""

    def kernel() -> Tensor:
        from optimum_freeact.kernels import w8_triton

        return w8_triton.w8_linear(x, weight, scale)

    return _attempt("w8_linear", kernel, lambda: torch.nn.functional.linear(x, weight.to(x.dtype)) * scale.to(x.dtype))


w8_linear_op = torch.library.custom_op("freeact::w8_linear", _w8_linear, mutates_args=())


@w8_linear_op.register_fake
def _(x, weight, scale):  # noqa: ARG001
    return x.new_empty((x.shape[0], weight.shape[0]))


def w8_linear(*args) -> Tensor:
    """As [`round_rows`]."""
    return (w8_linear_op if torch.compiler.is_compiling() else _w8_linear)(*args)
