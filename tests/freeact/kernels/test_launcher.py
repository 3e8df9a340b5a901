"""Launching a second time: the same arguments, in the same order, to what Triton made of them the first time."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.freeact.kernels.test_waits import BEFORE


SCRIPT = (
    BEFORE
    + """
import inspect
from triton.runtime import jit

log = []

def told(name, grid, values):
    log.append((name, (*grid, 1, 1)[:3], [v.data_ptr() if isinstance(v, torch.Tensor) else v.base.data_ptr() if hasattr(v, "base") else v for v in values]))

class Made:
    def __init__(self, name):
        self.name = name
    def __getitem__(self, grid):
        return lambda *args: told(self.name, grid, args)

compilations = []

def first(self, *args, grid, warmup, **options):
    named = {name: options.pop(name) for name in list(options) if name in self.arg_names}
    bound = inspect.signature(self.fn).bind(*args, **named)
    bound.apply_defaults()
    told(self.__name__, grid, bound.arguments.values())
    compilations.append(self.__name__)
    return Made(self.__name__)

JITFunction.run = first
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda device=None: (9, 0)
real = torch.empty
kept = {}

def empty(*size, **options):  # the same room again, so that addresses can be compared
    return kept.setdefault((str(size), str(options)), real(*size, **options))

from optimum_freeact.kernels import launcher, dp4a_triton, groups_gemv_triton, rounding_pass_hopper, rounding_pass_triton, rounding_triton
from optimum_freeact.kernels import w4_groups_triton, w4_hopper, w4_stream, w4_triton, w8_triton
from optimum_freeact.kernels.reference import Rows, type_columns
from tests.freeact.kernels.cases import input_side, random_weight
for module in (rounding_pass_hopper, w4_hopper, w4_stream):
    module.processors = lambda device: 132
torch.empty = empty

def twice(call, launches=1):
    log.clear(), compilations.clear(), launcher._compiled.clear()
    call()
    once, made = list(log), list(compilations)
    assert len(once) == len(made) == launches, (once, made)
    call()
    assert compilations == made, ("compiled again", compilations)
    assert log[launches:] == once, (log[launches:], once)
    print("SAME", *made)

types = torch.zeros(2048, dtype=torch.int64)
x = torch.zeros(2048, 4096, dtype=torch.bfloat16)
for rank, group in ((0, 0), (24, 0), (48, 16)):
    tables = input_side(4096, rank=rank, channel=False, group=group).tables
    weight = random_weight(512, 4096, rank=rank, n_bias=2, group=2 * group)
    weight = weight._replace(type_columns=type_columns(weight.type_bias, weight.low_rank is not None))
    for n in (1, 16, 2048):
        twice(lambda: rounding_triton.round_rows(x[:n], types[:n], tables), 3)
        if tables.one_pass:
            twice(lambda: rounding_pass_triton.round_rows(x[:n], types[:n], tables))
            twice(lambda: rounding_pass_hopper.round_rows(x[:n], types[:n], tables))
        codes = real(n, 4096, dtype=torch.float16 if group else torch.int8)
        rows = Rows(codes, real(1 if group else 3, n), real(n, tables.branch))
        modules = [w4_groups_triton] if group else [w4_triton]
        if n == 1:
            modules.append(groups_gemv_triton if group else dp4a_triton)
        if n > 64:
            modules.append(w4_hopper)
        elif not group:
            modules.append(w4_stream)
        for module in modules:
            twice(lambda: module.w4_linear(rows, types[:n], weight, torch.bfloat16))
flat = input_side(1184, rank=24, channel=False, group=16).tables
twice(lambda: rounding_triton.round_rows(x.view(-1)[: 4 * 1184].view(4, 1184), types[:4], flat), 4)
codes, scale = torch.zeros(64, 4096, dtype=torch.int8), torch.ones(64)
for n in (1, 8):
    twice(lambda: w8_triton.w8_linear(x[:n], codes, scale))

# another kind of argument is another kernel: rows that start elsewhere, a number of rows that 16 does not divide, another type
tables = input_side(4096, rank=0, channel=False).tables
rounding_pass_triton.round_rows(x[:16], types[:16], tables)
moved = x.view(-1)[1 : 1 + 16 * 4096].view(16, 4096)
for given in (moved, x[:17], x[:16].half()):
    log.clear(), compilations.clear()
    rounding_pass_triton.round_rows(given, types[: len(given)], tables)
    assert len(compilations) == 1, "taken for the same"
    print("OTHER")
"""
)


def test_the_second_launch_has_what_the_first_had():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'hf-concord[kernels]'")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    launched = {name for line in done.stdout.splitlines() if line.startswith("SAME") for name in line.split()[1:]}
    for name in (
        "_project",
        "_correct",
        "finish",
        "round_flat",
        "_round_tiles",
        "_w4_linear",
        "_w4_hopper",
        "_w4_stream",
    ):
        assert name in launched, sorted(launched)
    for name in ("_w4_groups", "_groups_gemv", "_dp4a_linear", "_w8_row", "_w8_linear"):
        assert name in launched, sorted(launched)
    assert done.stdout.count("OTHER") == 3


def test_a_triton_that_starts_compiled_kernels_otherwise_is_asked_as_usual(monkeypatch):
    launcher = pytest.importorskip("optimum_freeact.kernels.launcher", exc_type=ImportError)
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "_unknown", [])
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    asked = []

    class Kernel:
        arg_names = ("n", "SIZE")

        def __getitem__(self, grid):
            return lambda *given, **constants: asked.append((grid, given, constants)) or object()

    kernel = Kernel()
    for n in (32, 48, 64):
        launcher.start(kernel, (n,), (n,), SIZE=4)
    assert asked == [((n,), (n,), {"SIZE": 4}) for n in (32, 48, 64)]
    assert len(launcher._unknown) == 1  # the second time, and no third
