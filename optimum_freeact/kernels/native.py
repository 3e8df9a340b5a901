"""The kernels in C for CPUs (`native.c`): built once per machine by its own compiler, a second's work, and kept.

The library lies in `$XDG_CACHE_HOME/optimum_freeact` (`~/.cache` by default), named by a hash of the source, the
compiler and the CPU. Where there is no compiler torch's own products run, and [`obstacle`] says so.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from optimum_freeact.kernels.reference import Rows, Weight
from optimum_freeact.kernels.tables import InputTables


logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
FLAGS = (
    "-O3 -march=native -std=c99 -fPIC -shared -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-fassociative-math"
).split()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def cache_folder() -> Path:
    """Where built libraries lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optimum_freeact"


def build(folder: Path | None = None) -> Path:
    """The library's path, built if it is not there yet.

    Raises:
        `OSError`: without a compiler, or if it fails; the message says how.
    """
    compiler = shlex.split(os.environ.get("CC", ""))
    if not compiler:
        found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
        if found is None:
            raise OSError("no C compiler is found (cc, gcc, clang, or CC)")
        compiler = [found]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\n".join((SOURCE.read_text(), version, _cpu(), *FLAGS))
    folder = folder or cache_folder()
    target = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        command = [*compiler, *FLAGS, str(SOURCE), "-o", scratch, "-lm"]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if run.returncode:
            raise OSError(f"{compiler[0]} failed: {run.stderr.strip()[-300:]}")
        os.replace(scratch, target)
    except subprocess.TimeoutExpired:
        raise OSError(f"{compiler[0]} took more than 120 s") from None
    finally:
        Path(scratch).unlink(missing_ok=True)
    return target


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("The kernel in C is not used: %s.", error)
        return None, str(error)
    pointer, number, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.freeact_round_rows.argtypes = [pointer, pointer, integer, *[pointer] * 4, number, integer]
    library.freeact_round_rows.restype = integer
    library.freeact_w4_linear.argtypes = [*[pointer] * 6, integer, number, number, integer, integer]
    library.freeact_w4_linear.restype = None
    return library, None


def obstacle() -> str | None:
    """Why the kernels cannot run here, or `None`; builds them on the first call."""
    return _library()[1]


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mean", "channel", "basis", "basis_scale", "left", "right", "clip")),
        *((name, ctypes.c_long) for name in ("a", "b", "n_means", "n_clips", "rank", "width")),
        ("bits", ctypes.c_int),
        ("symmetric", ctypes.c_int),
    )


class _Weight(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("packed", "qscale", "row_sum", "low_rank", "low_rank_scale", "bias")),
        *((name, ctypes.c_long) for name in ("m", "half", "rank", "n_bias")),
    )


class NativeSide:
    """Tables of one input as C reads them; `tables` has float32 factors (`make_native_tables`) and is kept alive."""

    def __init__(self, tables: InputTables):
        self.tables, self.width, self.rank, self.branch = tables, tables.width, tables.rank, tables.branch
        parts = (tables.mean, tables.channel_scale, tables.basis, tables.basis_scale, tables.left, tables.right)
        n_means = 0 if tables.mean is None else len(tables.mean)
        sizes = (tables.a, tables.b, n_means, len(tables.clip), tables.rank, tables.branch)
        self._struct = _Side(*map(_at, parts), _at(tables.clip), *sizes, tables.bits, tables.symmetric)
        self.address = ctypes.addressof(self._struct)

    def __deepcopy__(self, memo: dict) -> NativeSide:
        return NativeSide(copy.deepcopy(self.tables, memo))

    def round_rows(self, x: torch.Tensor, types: torch.Tensor | None) -> Rows:
        """Rounded rows of `x` of shape `(n, d)`, contiguous."""
        n = len(x)
        codes = torch.empty(n, self.width, dtype=torch.int8)
        stats = torch.empty(3, n, dtype=torch.float32)
        branch = torch.empty(n, self.branch, dtype=torch.float32) if self.rank else None
        x = x.float() if x.dtype == torch.float16 else x
        failed = _library()[0].freeact_round_rows(
            self.address, x.data_ptr(), x.dtype == torch.bfloat16, _at(types), codes.data_ptr(), stats.data_ptr(),
            _at(branch), n, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for a row of {self.width} numbers.")
        return Rows(codes, stats, branch)


class NativeWeight:
    """One linear's tensors as C reads them, kept alive."""

    def __init__(self, weight: Weight):
        self.weight, self.m = weight, len(weight.packed)
        rank = 0 if weight.low_rank is None else weight.low_rank.shape[1]
        n_bias = 0 if weight.type_bias is None else len(weight.type_bias)
        self._low_rank = None if rank == 0 else weight.low_rank.mT.contiguous()
        parts = weight._replace(low_rank=self._low_rank)
        self._struct = _Weight(*map(_at, parts), self.m, weight.packed.shape[1], rank, n_bias)
        self.address = ctypes.addressof(self._struct)

    def tensors(self) -> list[torch.Tensor]:
        """All that is held, the transposed copy of the branch's factors included."""
        return [tensor for tensor in (*self.weight, self._low_rank) if tensor is not None]

    def __deepcopy__(self, memo: dict) -> NativeWeight:
        return NativeWeight(copy.deepcopy(self.weight, memo))

    def linear(self, rows: Rows, types: torch.Tensor | None, out_dtype: torch.dtype, bits: int) -> torch.Tensor:
        """Output `(n, m)` of rounded rows; `bits` of their codes (fewer are faster)."""
        codes, stats, branch = rows
        n, brief = len(codes), out_dtype == torch.bfloat16
        y = torch.empty(n, self.m, dtype=out_dtype if brief else torch.float32)
        width = 0 if branch is None else branch.shape[1]
        _library()[0].freeact_w4_linear(
            self.address, codes.data_ptr(), stats.data_ptr(), _at(branch), _at(types), y.data_ptr(), brief, n, width,
            bits, torch.get_num_threads(),
        )  # fmt: skip
        return y if y.dtype == out_dtype else y.to(out_dtype)


def round_rows(x: torch.Tensor, types: torch.Tensor | None, tables: InputTables) -> Rows:
    """[`NativeSide.round_rows`] once."""
    return NativeSide(tables).round_rows(x, types)


def w4_linear(
    rows: Rows, types: torch.Tensor | None, weight: Weight, out_dtype: torch.dtype, bits: int = 8
) -> torch.Tensor:
    """[`NativeWeight.linear`] once."""
    return NativeWeight(weight).linear(rows, types, out_dtype, bits)
