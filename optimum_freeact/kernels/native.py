"""The kernels in C for CPUs (`native.c`): built once per machine by its own compiler, a few seconds' work, and kept.

The compiler builds for the CPU it runs on, so that the same source becomes AVX-512 VNNI, AVX-VNNI, AVX2 or plain loops;
[`kind`] says which.

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
HEADERS = (Path(__file__).with_name("native_vectors.h"),)
FLAGS = (
    "-O3 -march=native -std=c11 -fPIC -shared -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-fassociative-math"
).split()
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")
MOST = 8  # linears of one call


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
    key = "\n".join((*(path.read_text() for path in (SOURCE, *HEADERS)), version, _cpu(), *FLAGS))
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
    library.freeact_linears.argtypes = [*[pointer] * 3, number, pointer, integer, pointer, integer, number, integer]
    library.freeact_round_rows.argtypes = [pointer, pointer, integer, *[pointer] * 4, number, integer]
    library.freeact_w4_linear.argtypes = [*[pointer] * 6, integer, number, number, number, integer]
    library.freeact_lanes.restype, library.freeact_kind.restype = number, ctypes.c_char_p
    return library, None


def _kernels() -> ctypes.CDLL:
    """The library, for those who know that there is one."""
    library, _ = _library()
    assert library is not None
    return library


def kind() -> str:
    """How this CPU multiplies bytes in the kernels, e.g. `"AVX-512 VNNI"`."""
    return _kernels().freeact_kind().decode()


def obstacle() -> str | None:
    """Why the kernels cannot run here, or `None`; builds them on the first call."""
    return _library()[1]


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Side(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("mean", "channel", "basis", "basis_scale", "left", "right", "clip")),
        *((name, ctypes.c_long) for name in ("a", "b", "b_padded", "n_means", "n_clips", "rank", "width")),
        ("group", ctypes.c_long),
        ("bits", ctypes.c_int),
        ("symmetric", ctypes.c_int),
    )


class _Weight(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("packed", "group_scale", "qscale", "row_sum")),
        *((n, ctypes.c_void_p) for n in ("low_rank", "low_rank_scale", "bias")),
        *((name, ctypes.c_long) for name in ("m", "half", "rank", "n_bias")),
    )


class NativeWeight:
    """One linear's tensors as C reads them, kept alive.

    Args:
        weight ([`Weight`]): As the other kernels read it.
        group_scale (`torch.Tensor`, `int8`, shape `(m, groups)`, *optional*): Scale of each group of columns, times
            `qscale` of its row; the groups' size is a multiple of 32.
        copies (*optional*): What an earlier one holds as `copies`: the branch's factors and `group_scale` in C's order.
    """

    def __init__(self, weight: Weight, group_scale: torch.Tensor | None = None, copies: tuple | None = None):
        weight = weight._replace(group_scale=None)  # held apart, for C has it in another order
        self.weight, self.m, self.group_scale = weight, len(weight.packed), group_scale
        rank = 0 if weight.low_rank is None else weight.low_rank.shape[1]
        n_bias = 0 if weight.type_bias is None else len(weight.type_bias)
        half = weight.packed.shape[1]
        if copies is None:
            low_rank = None if weight.low_rank is None or rank == 0 else weight.low_rank.mT.contiguous()
            copies = (low_rank, None if group_scale is None else _panels(group_scale, -(-half // 16)))
        self.copies = low_rank, panels = copies
        parts = (weight.packed, panels, weight.qscale, weight.row_sum, low_rank, *weight[4:6])
        self._struct = _Weight(*map(_at, parts), self.m, half, rank, n_bias)
        self.address = ctypes.addressof(self._struct)

    def tensors(self) -> list[torch.Tensor]:
        """All that is held, copies in another order included."""
        held = (*self.weight, self.group_scale, *self.copies)
        return [tensor for tensor in held if tensor is not None]

    def __deepcopy__(self, memo: dict) -> NativeWeight:
        return NativeWeight(copy.deepcopy(self.weight, memo), copy.deepcopy(self.group_scale, memo))

    def linear(
        self, rows: Rows, types: torch.Tensor | None, out_dtype: torch.dtype, group: int | None = None
    ) -> torch.Tensor:
        """Output `(n, m)` of rounded rows with a grid for every `group` columns."""
        codes, stats, branch = rows
        n, brief = len(codes), out_dtype == torch.bfloat16
        y = torch.empty(n, self.m, dtype=out_dtype if brief else torch.float32)
        width = 0 if branch is None else branch.shape[1]
        failed = _kernels().freeact_w4_linear(
            self.address, codes.data_ptr(), stats.data_ptr(), _at(branch), _at(types), y.data_ptr(), brief, n, width,
            group or codes.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for {n} rows of {codes.shape[1]} codes.")
        return y if y.dtype == out_dtype else y.to(out_dtype)


def _panels(group_scale: torch.Tensor, blocks: int) -> torch.Tensor:
    """Scales `(m, groups)` in the order in which C reads them: `(panels, blocks of 32 columns, rows of a panel)`."""
    lanes = _kernels().freeact_lanes()
    spread = group_scale.repeat_interleave(blocks // group_scale.shape[1], 1)
    spread = torch.nn.functional.pad(spread, (0, 0, 0, -len(spread) % lanes))
    return spread.view(-1, lanes, blocks).mT.contiguous()


class NativeSide:
    """Tables of one input as C reads them; `tables` has float32 factors (`make_native_tables`) and is kept alive.

    Args:
        tables ([`InputTables`]): Of the stored map.
        group (`int`, *optional*): Columns that share a grid, a multiple of 16; all of them by default.
    """

    def __init__(self, tables: InputTables, group: int | None = None):
        self.tables, self.width, self.rank, self.branch = tables, tables.width, tables.rank, tables.branch
        self.group = group or self.width
        self._right = torch.nn.functional.pad(tables.right, (0, -tables.b % 16)).contiguous()
        parts = (tables.mean, tables.channel_scale, tables.basis, tables.basis_scale, tables.left, self._right)
        n_means = 0 if tables.mean is None else len(tables.mean)
        sizes = (
            tables.a,
            tables.b,
            self._right.shape[1],
            n_means,
            len(tables.clip),
            tables.rank,
            tables.branch,
            self.group,
        )
        self._struct = _Side(*map(_at, parts), _at(tables.clip), *sizes, tables.bits, tables.symmetric)
        self.address = ctypes.addressof(self._struct)

    def tensors(self) -> list[torch.Tensor]:
        """All tables."""
        return [tensor for tensor in (*self.tables.tensors(), self._right) if tensor is not None]

    def __deepcopy__(self, memo: dict) -> NativeSide:
        return NativeSide(copy.deepcopy(self.tables, memo), self.group)

    def linears(self, x: torch.Tensor, types: torch.Tensor | None, weights: list[NativeWeight]) -> list[torch.Tensor]:
        """Outputs `(..., m)` of all linears that read `x` of shape `(..., d)`, in its dtype.

        Args:
            x (`torch.Tensor`): float32, bfloat16 or float16.
            types (`torch.Tensor` of shape `(...)`, *optional*): Token types.
            weights: Those of the linears.
        """
        dtype, shape = x.dtype, x.shape[:-1]
        if dtype == torch.float16:
            x = x.float()
        x = x.contiguous()
        n, brief = x.numel() // self.width, x.dtype == torch.bfloat16
        outputs = [torch.empty((*shape, weight.m), dtype=x.dtype) for weight in weights]
        if types is not None:
            types = types.contiguous()
        for at in range(0, len(weights), MOST):
            part = weights[at : at + MOST]
            count = len(part)
            failed = _kernels().freeact_linears(
                self.address, (ctypes.c_void_p * count)(*[weight.address for weight in part]),
                (ctypes.c_void_p * count)(*[y.data_ptr() for y in outputs[at : at + MOST]]), count,
                x.data_ptr(), brief, None if types is None else types.data_ptr(), brief, n, torch.get_num_threads(),
            )  # fmt: skip
            if failed:
                raise MemoryError(f"no memory for {n} rows of {self.width} numbers.")
        return outputs if dtype == x.dtype else [y.to(dtype) for y in outputs]

    def round_rows(self, x: torch.Tensor, types: torch.Tensor | None) -> Rows:
        """Rounded rows of `x` of shape `(n, d)`, contiguous; with several grids `stats` is `(3, n, grids)`."""
        n, grids = len(x), -(-self.width // self.group)
        codes = torch.empty(n, self.width, dtype=torch.int8)
        stats = torch.empty((3, n) if grids == 1 else (3, n, grids), dtype=torch.float32)
        branch = torch.empty(n, self.branch, dtype=torch.float32) if self.rank else None
        x = x.float() if x.dtype == torch.float16 else x
        failed = _kernels().freeact_round_rows(
            self.address, x.data_ptr(), x.dtype == torch.bfloat16, _at(types), codes.data_ptr(), stats.data_ptr(),
            _at(branch), n, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for a row of {self.width} numbers.")
        return Rows(codes, stats, branch)


def round_rows(x: torch.Tensor, types: torch.Tensor | None, tables: InputTables) -> Rows:
    """[`NativeSide.round_rows`] once."""
    return NativeSide(tables).round_rows(x, types)


def w4_linear(
    rows: Rows, types: torch.Tensor | None, weight: Weight, out_dtype: torch.dtype, bits: int = 8
) -> torch.Tensor:
    """[`NativeWeight.linear`] once; the time does not depend on `bits`."""
    del bits
    return NativeWeight(weight).linear(rows, types, out_dtype)
