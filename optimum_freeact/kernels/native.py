"""The kernels in C for CPUs (`native.c`): built once per machine by its own compiler, a second's work, and kept.

The library lies in `$XDG_CACHE_HOME/optimum_freeact` (`~/.cache` by default), named by a hash of the source, the
compiler and the CPU. Where there is no compiler torch's own products run, and [`obstacle`] says so.
"""

from __future__ import annotations

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
MAX_RANK = 64  # of the branch, a buffer in the C code


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
    library.freeact_round_rows.argtypes = [
        pointer, integer, *[pointer] * 11, *[number] * 7, integer, integer, integer,
    ]  # fmt: skip
    library.freeact_round_rows.restype = integer
    library.freeact_w4_linear.argtypes = [*[pointer] * 11, integer, *[number] * 6, integer, integer]
    library.freeact_w4_linear.restype = None
    return library, None


def obstacle() -> str | None:
    """Why the kernels cannot run here, or `None`; builds them on the first call."""
    return _library()[1]


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def round_rows(x: torch.Tensor, types: torch.Tensor | None, tables: InputTables) -> Rows:
    """Rounded rows of `x` of shape `(n, d)`, contiguous; `tables` with float32 factors (`make_native_tables`)."""
    n, d = x.shape
    codes = torch.empty(n, d, dtype=torch.int8)
    stats = torch.empty(3, n)
    branch = torch.empty(n, tables.branch) if tables.rank else None
    x = x.float() if x.dtype == torch.float16 else x
    failed = _library()[0].freeact_round_rows(
        _at(x), x.dtype == torch.bfloat16, _at(types), _at(tables.mean), _at(tables.channel_scale), _at(tables.basis),
        _at(tables.basis_scale), _at(tables.left), _at(tables.right), _at(tables.clip), _at(codes), _at(stats),
        _at(branch), n, tables.a, tables.b, 0 if tables.mean is None else len(tables.mean), len(tables.clip),
        tables.rank, tables.branch, tables.bits, tables.symmetric, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for a row of {d} numbers.")
    return Rows(codes, stats, branch)


def w4_linear(
    rows: Rows, types: torch.Tensor | None, weight: Weight, out_dtype: torch.dtype, bits: int = 8
) -> torch.Tensor:
    """Output `(n, m)` of rounded rows; `bits` of their codes (fewer are faster)."""
    n, m = len(rows.codes), len(weight.packed)
    y = torch.empty(n, m, dtype=torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32)
    rank = 0 if weight.low_rank is None else weight.low_rank.shape[1]
    if rank > MAX_RANK:
        raise ValueError(f"the kernel in C serves ranks up to {MAX_RANK}, got {rank}.")
    _library()[0].freeact_w4_linear(
        _at(rows.codes), _at(rows.stats), _at(rows.branch), _at(types), _at(weight.packed), _at(weight.qscale),
        _at(weight.row_sum), _at(weight.low_rank), _at(weight.low_rank_scale), _at(weight.type_bias), _at(y),
        out_dtype == torch.bfloat16, n, m, weight.packed.shape[1], rank,
        0 if rows.branch is None else rows.branch.shape[1],
        0 if weight.type_bias is None else len(weight.type_bias), bits, torch.get_num_threads(),
    )  # fmt: skip
    return y.to(out_dtype)
