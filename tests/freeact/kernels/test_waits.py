"""What Triton makes of kernels for Hopper, compiled without a GPU: no product may run on while later rows come to its memory."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest


BEFORE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Nothing:
    def __getattr__(self, name):
        return lambda *args, **options: {"max_shared_mem": 232448, "multiprocessor_count": 132}

class Fake:
    utils = Nothing()
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    is_active = staticmethod(lambda: True)
    def __getattr__(self, name):
        return lambda *args, **options: None

driver.set_active(Fake())
from triton.runtime.jit import JITFunction
run = JITFunction.run
"""
SCRIPT = (
    BEFORE
    + """
def compiled(self, *args, grid, warmup, **options):
    made = run(self, *args, grid=grid, warmup=True, **options)
    text = made.asm["ttgir"]
    print("KERNEL", self.__name__, "products", text.count("warp_group_dot "), "left", *re.findall(r"pendings = ([0-9]+)", text))
    return made
import re
JITFunction.run = compiled
from optimum_freeact.kernels import launcher
launcher._compiled = type("Forgetful", (dict,), {"__setitem__": lambda *args: None})()
from optimum_freeact.kernels import rounding_pass_triton, rounding_triton, w4_hopper, w4_stream
from optimum_freeact.kernels.reference import Rows
from tests.freeact.kernels.cases import input_side, random_weight
w4_stream.processors = w4_hopper.processors = lambda device: 132
for rank, width, n in ((0, 16, 16), (48, 64, 16), (24, 32, 5), (24, 32, 2048)):
    rows = Rows(torch.empty(n, 512, dtype=torch.int8), torch.empty(3, n), torch.empty(n, width))
    (w4_stream if n <= 16 else w4_hopper).w4_linear(rows, torch.zeros(n, dtype=torch.int64), random_weight(256, 512, rank=rank, n_bias=1), torch.bfloat16)
x, types = torch.empty(2048, 14336, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.int64)
for d in (2048, 14336):
    rounding_triton.round_rows(x[:, :d], types, input_side(d, rank=24, channel=False).tables)
for d in (4096, 14336):
    for changes in ({}, {"stages": 2}, {"ahead": True}):
        rounding_pass_triton.round_rows(x[:, :d], types, input_side(d, rank=0, channel=False).tables, options=changes)
from optimum_freeact.kernels import launches, rounding_pass_hopper
rounding_pass_hopper.processors = lambda device: 132
for d in (4096, 14336):
    one = torch.empty(2048, d, dtype=torch.bfloat16)
    for changes in ({}, {"workers": 2, "deep": 2, "soon": True, "ahead": True}):
        rounding_pass_hopper.round_rows(one, types, input_side(d, rank=0, channel=False).tables, options=changes)
"""
)


def test_kernels_wait_for_their_products():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'hf-concord[kernels]'")

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    for kernel, launches, least in (
        ("_w4_hopper", 1, 8),
        ("_w4_stream", 3, 4),
        ("_project", 2, 1),
        ("_round_tiles", 6 + 4, 2),
    ):
        found = re.findall(rf"KERNEL {kernel} products (\d+) left(.*)", done.stdout)
        assert len(found) == launches, done.stderr[-2000:]
        for products, left in found:
            assert int(products) >= least, "this Triton multiplies another way: look at it anew"
            assert set(left.split()) == {"0"}


ORDER = (
    BEFORE
    + """
def compiled(self, *args, grid, warmup, **options):
    made = run(self, *args, grid=grid, warmup=True, **options)
    ptx = made.asm["ptx"]
    wait, let = (ptx.find("griddepcontrol." + name) for name in ("wait", "launch_dependents"))
    print("ORDER", self.__name__, 0 < wait < let)
    return made
JITFunction.run = compiled
from optimum_freeact.kernels import launcher
launcher._compiled = type("Forgetful", (dict,), {"__setitem__": lambda *args: None})()
from optimum_freeact.kernels import dp4a_triton, groups_gemv_triton, rounding_pass_triton, w4_groups_triton, w4_triton, w8_triton
from optimum_freeact.kernels.reference import Rows
from tests.freeact.kernels.cases import input_side, random_weight
for module in (dp4a_triton, groups_gemv_triton, rounding_pass_triton, w4_groups_triton, w4_triton, w8_triton):
    module.launch_pdl = lambda wanted: {"launch_pdl": True} if wanted else {}
types = torch.zeros(16, dtype=torch.int64)
for n, plain, grouped in ((1, dp4a_triton, groups_gemv_triton), (16, w4_triton, w4_groups_triton)):
    rows = Rows(torch.empty(n, 512, dtype=torch.int8), torch.empty(3, n), None)
    plain.w4_linear(rows, types[:n], random_weight(256, 512, rank=0), torch.bfloat16)
    values = Rows(torch.empty(n, 512, dtype=torch.float16), torch.empty(1, n), None)
    grouped.w4_linear(values, types[:n], random_weight(256, 512, rank=0, group=32), torch.bfloat16)
rounding_pass_triton.round_rows(torch.empty(16, 512, dtype=torch.bfloat16), types, input_side(512, rank=0, channel=False).tables)
w8_triton.w8_linear(torch.empty(1, 512, dtype=torch.bfloat16), torch.empty(256, 512, dtype=torch.int8), torch.empty(256, dtype=torch.bfloat16))
"""
)


def test_products_let_the_next_kernel_start_only_once_their_input_is_there():
    """Kernels of others that start early read, without a wait, whatever the kernel before the one before them wrote."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'hf-concord[kernels]'")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ORDER], capture_output=True, text=True, env=environment, check=False)
    found = dict(re.findall(r"ORDER (\w+) (\w+)", done.stdout))
    assert len(found) == 6, done.stderr[-2000:]
    assert set(found.values()) == {"True"}, found
