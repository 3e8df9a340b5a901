"""The kernels for groups, rounding in one pass and the stream, against their specification, once on each GPU before a model
uses them.

The first serve the default preset, and a kernel that compiles can still be wrong on a GPU or a Triton that it was not tested
on. Where they disagree with torch, or do not run, torch takes their place and `freeact inspect` says why; rounding in one pass
gives way to three launches, and the product that streams its weight to Triton's, with a warning. It takes a few seconds when Triton has nothing in its cache, and a moment later on.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from optimum_freeact.kernels import reference
from optimum_freeact.kernels.asked_once import asked_once
from optimum_freeact.kernels.tables import InputTables, make_tables
from optimum_freeact.numerics.byte_rows import column_codes
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.kronecker import factor_pair
from optimum_freeact.numerics.packing import pack
from optimum_freeact.transforms.affine_map import InputMap


WIDTH, OUTPUTS, RANK = 512, 1536, 4
VALUE_GROUP, WEIGHT_GROUP = 16, 32  # those of the default preset
ROWS = (1, 16, 2048)  # one row, few, and so many that programs stay on their multiprocessors
# What a rounding that falls the other way at a tie costs stays below a hundredth; what is wrong is of the order of one
ROUNDING_ERROR = 0.05
PRODUCT_ERROR = 0.01  # outputs are bfloat16, whose own rounding is 0.002


def on_gpu(index: int | None, compare: Callable) -> tuple[str | None, str | None]:
    """What a comparison on a CUDA device (`None`: the current one) says, and the error that ended it. A full GPU says nothing of a
    kernel: that is raised.
    """
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    try:
        with torch.no_grad(), torch.cuda.device(device):
            return compare(device), None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def obstacle_of(kernels: str, index: int | None, compare: Callable) -> str | None:
    """Why some kernels are not to be used on a CUDA device, by a comparison, or `None`."""
    found, error = on_gpu(index, compare)
    if error is not None:
        return f"{kernels} do not run on this GPU ({error})"
    return None if found is None else f"{kernels} disagree with torch on this GPU ({found})"


@asked_once
def groups_obstacle(index: int | None, special: Callable) -> str | None:
    """Why the kernels for groups are not to be used on a CUDA device, or `None`; `special` as in [`disagreement`]."""
    return obstacle_of("the kernels for groups", index, lambda device: disagreement(device, special))


@asked_once
def pass_obstacle(index: int | None, module: str) -> str | None:
    """Why a module is not to round rows without a branch in one pass on a CUDA device, or `None`."""
    found, error = on_gpu(index, lambda device: pass_disagreement(device, module))
    return error or found


PASS_WIDTHS = {"rounding_pass_triton": WIDTH, "rounding_pass_hopper": 14336}  # 112 lines of a tile of 128


def pass_disagreement(device: torch.device, module: str, rows: tuple[int, ...] = (1, 304)) -> str | None:
    """What rounding in one pass does otherwise than its specification, by more than rounding at an edge, or `None`."""
    width = PASS_WIDTHS[module]
    found, tables = _input_side(device, rank=0, group=0, width=width)
    for n, x, types in _rows(device, rows, width):
        want = reference.round_rows(x, types, found, tables.clip, 4, False, tables.branch, torch.float64)
        got = import_module(f"optimum_freeact.kernels.{module}").round_rows(x, types, tables)
        error = relative(_dequantized(got), _dequantized(want))
        if not error <= ROUNDING_ERROR:  # nan too
            return f"codes of {n} rows: error {error:.2g}, at most {ROUNDING_ERROR:g} was expected"
    return None


@asked_once
def stream_obstacle(index: int | None) -> str | None:
    """Why few rows are not to be multiplied by `w4_stream` on a Hopper GPU, or `None`."""

    def compare(device: torch.device) -> str | None:
        from optimum_freeact.kernels import w4_stream

        return product_disagreement(device, w4_stream.w4_linear)

    found, error = on_gpu(index, compare)
    return error or found


def product_disagreement(device: torch.device, w4_linear: Callable, rows: tuple[int, ...] = (5, 16)) -> str | None:
    """What a product of codes without groups does otherwise than its specification, with a branch and without, or `None`."""
    whole = _weight(device)._replace(group_scale=None)
    for weight in (whole, whole._replace(low_rank=None, low_rank_scale=None)):
        for n, x, types in _rows(device, rows):
            codes = (4 * x.float()).round_().clamp_(-8, 7).to(torch.int8)
            scale, total = x[:, 0].float().abs() + 0.1, codes.sum(1).float()
            branch = torch.nn.functional.pad(x[:, :RANK].float(), (0, 32 - RANK)).contiguous()
            given = reference.Rows(codes, torch.stack((scale, scale / 2, total)), branch)
            exact = reference.w4_linear(given, types, weight, torch.float64, torch.float64)
            error = relative(w4_linear(given, types, weight, torch.bfloat16), exact)
            if not error <= PRODUCT_ERROR:  # nan too
                return f"product of {n} rows: relative error {error:.2g}, at most {PRODUCT_ERROR:g} was expected"
    return None


def _dequantized(rows: reference.Rows) -> torch.Tensor:
    scale, offset, _ = rows.stats.double().unsqueeze(-1)
    return rows.codes.double() * scale + offset


def _rows(device: torch.device, rows: tuple[int, ...], width: int = WIDTH):
    """Numbers of tokens, each with rows and types."""
    generator = torch.Generator().manual_seed(2)
    for n in rows:
        x = torch.randn(n, width, generator=generator).bfloat16().to(device)
        yield n, x, torch.randint(0, 2, (n,), generator=generator).to(device)


def disagreement(device: torch.device, special: Callable, rows: tuple[int, ...] = ROWS) -> str | None:
    """What differs by more than rounding does, or `None`.

    Args:
        device (`torch.device`): Where the kernels run.
        special: Rows, weight and dtype -> the module of a kernel for this GPU alone, or `None` (`dispatch.hopper_kernel`).
        rows (`tuple[int, ...]`, *optional*): Numbers of tokens.
    """
    found, tables = _input_side(device)
    weight = _weight(device)
    for n, x, types in _rows(device, rows):
        for name, error, most in _errors(x, types, found, tables, weight, special):
            if not error <= most:  # nan too
                return f"{name} of {n} rows: relative error {error:.2g}, at most {most:g} was expected"
    return None


def _errors(x, types, found: InputMap, tables: InputTables, weight: reference.Weight, special: Callable):
    """Name, relative error and bar of the rounding and of the products of the rows that it made."""
    from optimum_freeact.kernels import groups_gemv_triton, rounding_triton, w4_groups_triton

    asked = (tables.clip, tables.bits, tables.symmetric, tables.branch)
    want = reference.round_rows(x, types, found, *asked, torch.float64, VALUE_GROUP)
    assert tables.mean is not None
    want = reference.marked(want, types, tables.rank, len(tables.mean))
    got = rounding_triton.round_rows(x, types, tables)
    yield "rounding", relative(_values(got), _values(want)), ROUNDING_ERROR
    yield "branch", relative(got.branch, want.branch), PRODUCT_ERROR
    exact = reference.w4_linear(got, types, weight, torch.float64, torch.float64)
    modules = [groups_gemv_triton if len(x) == 1 else w4_groups_triton]
    name = special(got, weight, torch.bfloat16)
    if name is not None:
        modules.append(import_module(f"optimum_freeact.kernels.{name}"))
    for module in modules:
        product = module.w4_linear(got, types, weight, torch.bfloat16)
        yield "product", relative(product, exact), PRODUCT_ERROR


def _values(rows: reference.Rows) -> torch.Tensor:
    return rows.codes.double() * rows.stats[0].double()[:, None]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Distance of two tensors, over the norm of the second."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def _input_side(
    device: torch.device, rank: int = RANK, group: int = VALUE_GROUP, width: int = WIDTH
) -> tuple[InputMap, InputTables]:
    """A map with all its parts but a channel scale, which no preset of ours has."""
    generator = torch.Generator().manual_seed(0)
    left, right = (flat_rotation(size, generator).float() for size in factor_pair(width))
    codes, scale = column_codes(torch.linalg.qr(torch.randn(width, RANK, generator=generator))[0])
    mean, clip = torch.randn(2, width, generator=generator), torch.tensor([0.9, 0.8])
    mean, basis, left, right = (tensor.to(device) for tensor in (mean, codes.float() * scale, left, right))
    codes, scale, clip = (tensor.to(device) for tensor in (codes, scale, clip))
    if rank == 0:
        basis = codes = scale = None
    found = InputMap(mean, None, basis, left, right)
    return found, make_tables(found, codes, scale, clip, 4, False, group)


def _weight(device: torch.device) -> reference.Weight:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (OUTPUTS, WIDTH), generator=generator)
    groups = torch.randint(-127, 128, (OUTPUTS, WIDTH // WEIGHT_GROUP), dtype=torch.int8, generator=generator)
    parts = (
        pack(codes.unsqueeze(1), 4).squeeze(1),
        torch.rand(OUTPUTS, generator=generator) * 0.001 + 0.0001,
        codes.sum(1, dtype=torch.int32),
        torch.randint(-127, 128, (OUTPUTS, RANK), dtype=torch.int8, generator=generator),
        torch.rand(RANK, generator=generator) * 0.01,
        torch.randn(2, OUTPUTS, generator=generator),
        groups,
    )
    return reference.Weight(*(part.to(device) for part in parts))
