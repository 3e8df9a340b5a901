"""Which code runs a quantized linear, by device, capability and settings.

[`plan`] chooses once per layer, when it is prepared, and says why; `FREEACT_KERNELS` overrides it:

- `auto` (default): the kernels of this package where they serve, else torch;
- `torch`: never a kernel of this package;
- `triton`, `native`: that one, and an error where it cannot run.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from optimum_freeact.kernels.asked_once import asked_once
from optimum_freeact.kernels.reference import MOST_MARKED, Rows, Weight
from optimum_freeact.kernels.tables import InputTables
from optimum_freeact.kernels.torch_product import torch_product
from optimum_freeact.numerics.kronecker import factor_pair


ENVIRONMENT = "FREEACT_KERNELS"
CHOICES = ("auto", "torch", "triton", "native")
MIN_CAPABILITY = (8, 0)  # integer tensor cores with bfloat16 beside them
MAX_WIDTH = 32768  # a row is one tile
GROUP = 32  # columns that the kernel in C multiplies before it scales


class Plan(NamedTuple):
    """What runs a layer, and the reason in one line. `name` is `"triton"`, `"native"` or `"torch"`."""

    name: str
    product: str
    reason: str


@torch.compiler.assume_constant_result
def wanted() -> str:
    """The value of `FREEACT_KERNELS`.

    Raises:
        `ValueError`: for a value that is not known.
    """
    value = os.environ.get(ENVIRONMENT, "auto").strip().lower() or "auto"
    if value not in CHOICES:
        raise ValueError(f"{ENVIRONMENT}={value!r} is not known; use one of {list(CHOICES)}, or unset it for 'auto'.")
    return value


@asked_once
def triton_obstacle(index: int | None) -> str | None:
    """Why Triton cannot run on a CUDA device, or `None`."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'hf-concord[kernels]')"
    if torch.version.hip is not None:
        return "the kernels were never run on ROCm"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"the GPU's compute capability is {capability}, the kernels need {MIN_CAPABILITY}"
    return None


def layer_obstacle(
    *,
    weight_bits: int,
    activation_bits: int,
    group_size: int | None,
    transform: str,
    activation_group_size: int | None = None,
    width: int | None = None,
    masked: bool = False,
    kernel: str = "triton",
) -> str | None:
    """Why a kernel of this package does not serve a layer with these settings, or `None`."""
    if weight_bits != 4:
        return f"weight_bits={weight_bits}: the kernels read 4-bit weights"
    if activation_bits not in (4, 8):
        return f"activation_bits={activation_bits}: the kernels multiply integers"
    for name, size in (("weight_group_size", group_size), ("activation_group_size", activation_group_size)):
        if size is None:
            continue
        if kernel == "triton":
            if name == "weight_group_size" and (size < 16 or size & (size - 1)):
                return f"{name}={size}: the kernels for GPUs read groups of 16, 32, 64, ... columns"
            if size % 2:
                return f"{name}={size}: the kernels for GPUs need even groups"
            continue
        least = GROUP if name == "weight_group_size" else GROUP // 2
        if size % least:
            return f"{name}={size}: the kernel in C adds up {least} columns at a time"
    if transform not in ("hadamard", "kronecker"):
        return f"transform={transform!r}: the kernels rotate by two factors"
    if masked:
        return (
            "token types with coordinates or directions of their own: the kernels know means and clips of types only"
        )
    if width is not None and (width % 16 or width > MAX_WIDTH):
        return f"in_features={width}: the kernels need a multiple of 16 up to {MAX_WIDTH}"
    if width is not None and factor_pair(width)[1] % 2:
        return f"in_features={width} = {'{} x {}'.format(*factor_pair(width))}: the kernels need an even second factor"
    return None


def plan(device: torch.device | str, *, low_rank: int | None = None, **layer) -> Plan:
    """What runs a layer on a device; `layer` as in [`layer_obstacle`], the rank of its branch only for the reason.

    Raises:
        `ValueError`: if `FREEACT_KERNELS` names a kernel that cannot run on this device, or the file that `FREEACT_LAUNCHES` names
            is not one of settings.
    """
    device, choice = torch.device(device), wanted()
    if choice == "torch":
        product, reason = torch_product(device, layer)
        return Plan("torch", product, f"{ENVIRONMENT}=torch; {reason}")
    kernel = {"cuda": "triton", "cpu": "native"}.get(device.type)
    obstacle: str | None
    if kernel == "triton":
        obstacle = triton_obstacle(device.index)
    elif kernel == "native":
        from optimum_freeact.kernels.native import obstacle as native_obstacle

        obstacle = native_obstacle()
    else:
        obstacle = f"no kernel is written for device type {device.type!r}"
    if choice not in ("auto", kernel) or (choice == kernel and obstacle):
        because = obstacle if choice == kernel else f"this is device type {device.type!r}"
        raise ValueError(f"{ENVIRONMENT}={choice} cannot be followed: {because}. Unset it for 'auto'.")
    obstacle = layer_obstacle(**layer, kernel=kernel or "triton") or obstacle
    if obstacle is None and kernel == "triton" and choice == "auto" and _has_groups(layer):
        from optimum_freeact.kernels.self_check import groups_obstacle

        obstacle = groups_obstacle(device.index, hopper_kernel)
    if obstacle is not None:
        product, reason = torch_product(device, layer)
        return Plan("torch", product, obstacle if reason in obstacle else f"{obstacle}; {reason}")
    if kernel == "triton":
        from optimum_freeact.kernels.launches import check_launches

        check_launches()
        return _triton_plan(device, _has_groups(layer), low_rank)
    from optimum_freeact.kernels.native import kind

    return Plan("native", "4-bit kernel in C", f"packed weights stay packed; compiled once for this CPU ({kind()})")


def _triton_plan(device: torch.device, has_groups: bool, low_rank: int | None) -> Plan:
    """What Triton's and Gluon's kernels do on this GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    hopper = (major, minor) == (9, 0)
    if has_groups:
        product = "4-bit Triton kernels for groups"
        ways = "codes times their groups' bytes are whole numbers in float16, multiplied on float16 tensor cores"
        ways += ", many rows by warps with roles of their own" if hopper else ""
    else:
        product = "4-bit Triton kernels"
        if hopper:
            ways = "one row on plain cores, more on int8 tensor cores, few and many by warps with roles of their own"
        else:
            ways = f"one row to {DP4A_ROWS} on plain cores, more on int8 tensor cores"
        ways += "; without a branch rows are rounded in one pass" if low_rank == 0 else ""
    return Plan("triton", product, f"compute capability {major}.{minor}; {ways}")


def _has_groups(layer: dict) -> bool:
    return layer.get("group_size") is not None or layer.get("activation_group_size") is not None


def hopper_rounding(x: torch.Tensor, tables: InputTables) -> bool:
    """Whether the kernel for Hopper rounds these rows in one pass; other sizes and GPUs have Triton's."""
    if not x.is_cuda or not is_hopper(x.device.index) or x.data_ptr() % 16:
        return False
    return tables.one_pass and tables.channel_scale is None and fits_hopper(tables.a, tables.b)


def fits_hopper(a: int, b: int) -> bool:
    """Whether tiles of these factors are whole warps' lines, and powers of two across."""
    return b in (64, 128) and a % 16 == 0 and 32 < a <= 128


HOPPER_TILES = 96  # tiles of 128 rows by 256 outputs from which keeping programs on their multiprocessors pays


@asked_once
def is_hopper(index: int | None) -> bool:
    """Whether a CUDA device has compute capability 9.0, for which a kernel is written in Gluon."""
    return torch.version.hip is None and torch.cuda.get_device_capability(index) == (9, 0)


def hopper_kernel(rows: Rows, weight: Weight, out_dtype: torch.dtype) -> str | None:
    """The module whose kernel for Hopper serves these rows best, or `None` where the others do."""
    if not rows.codes.is_cuda or not is_hopper(rows.codes.device.index):
        return None
    if rows.codes.dtype == torch.int8 and stream_choice(len(rows.codes), weight):
        return STREAM
    if weight.type_bias is not None and len(weight.type_bias) > MOST_MARKED:
        return None
    group = 0 if weight.group_scale is None else weight.packed.shape[1] // weight.group_scale.shape[1]
    branch = 0 if rows.branch is None else rows.branch.shape[1]
    m, half = weight.packed.shape
    return hopper_choice(len(rows.codes), m, half, branch, out_dtype, group)


STREAM = "w4_stream"
STREAM_ROWS = 32  # rows up to which the weight's way to the multiprocessors is what counts


def stream_choice(n: int, weight: Weight) -> bool:
    """Whether `w4_stream` serves this number of rows: pieces of 128 bytes of a row, biases of four types and a rank of 48 at most, and a
    weight that is worth the start. Few rows of no great length are multiplied on plain cores as fast as memory brings the weight.
    """
    biases = 0 if weight.type_bias is None else len(weight.type_bias)
    rank = 0 if weight.low_rank is None else weight.low_rank.shape[1]
    m, half = weight.packed.shape
    if not 0 < n <= STREAM_ROWS or half % 128 or biases > 4 or rank > 48:
        return False
    long = half > 4096  # plain cores would have few outputs at a time
    return m * half >= (STREAM_BYTES if n > 2 or long else 4 * STREAM_BYTES) and (n > 1 or long)


STREAM_BYTES = 1 << 22  # of a weight


def hopper_choice(n: int, m: int, half: int, branch: int, out_dtype: torch.dtype, group: int = 0) -> str | None:
    """[`hopper_kernel`] by sizes: rows, outputs, bytes of a row of the weight, columns of the branch, bytes of a group."""
    if group > 32:
        return None  # a step goes through 32 bytes of a row
    if n <= 64 or m % 8 or half % 64 or branch > 64 or out_dtype.itemsize != 2:
        return None  # few rows, or sizes that the copy engine's pieces do not divide
    return "w4_hopper" if -(-n // 128) * -(-m // 256) >= HOPPER_TILES else None


DP4A_ROWS = 4  # rows up to which plain cores multiply as fast as memory brings the weight
