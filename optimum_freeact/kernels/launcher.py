"""Launches of Triton kernels that cost the host little from the second time on.

Triton works out anew in each launch what a kernel is specialized for: a tenth of a millisecond with many arguments, as long as the kernels
of a whole linear run. Here what it found is kept by the kinds of the arguments, which are all that it looks at: of a tensor the type and
whether it starts at a multiple of 16 bytes, of a whole number whether it is one, divisible by 16, or wants 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.runtime import driver

from optimum_freeact.kernels.triton_state import INTERPRETED


_compiled: dict[tuple, tuple[Any, tuple]] = {}
_unknown: list[Exception] = []  # why compiled kernels of this Triton are not started here


def kinds(given: Sequence) -> list:
    """All that Triton specializes a kernel by in arguments that are no constants: tensors, whole numbers, descriptors, `None`."""
    found: list = []
    for value in given:
        if isinstance(value, Tensor):
            found += (value.dtype, value.data_ptr() % 16 == 0)
        elif value is None:
            found.append(None)
        elif isinstance(value, int):
            size = 32 if -(1 << 31) <= value < 1 << 31 else 64  # bits
            found.append("one" if value == 1 else (size, value % 16 == 0))
        else:  # `w4_hopper.described`
            found.append(value.kind)
    return found


def start(kernel, grid: tuple[int, ...], given: Sequence, **constants) -> None:
    """`kernel[grid](*given, **constants)`: `given` are the kernel's first arguments, all that are no constants."""
    if INTERPRETED or _unknown:
        kernel[grid](*given, **constants)
        return
    key = (id(kernel), driver.active.get_current_device(), *constants.values(), *kinds(given))
    known = _compiled.get(key)
    if known is None:
        made = kernel[grid](*given, **constants)
        rest = tuple(constants[name] for name in kernel.arg_names[len(given) :])
        _compiled[key] = made, rest
        return
    made, rest = known
    try:
        made[(*grid, 1, 1)](*given, *rest)
    except (TypeError, AttributeError) as error:  # a Triton that starts them in another way
        _unknown.append(error)
        kernel[grid](*given, **constants)
