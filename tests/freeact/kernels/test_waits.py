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
from optimum_freeact.kernels import rounding_triton
from tests.freeact.kernels.cases import input_side
for d in (2048, 14336):
    tables = input_side(d, rank=24, channel=False).tables
    rounding_triton.round_rows(torch.empty(2048, d, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.int64), tables)
"""
)


def test_the_projection_waits_for_its_products():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'hf-concord[kernels]'")

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    found = re.findall(r"KERNEL _project products (\d+) left(.*)", done.stdout)
    assert len(found) == 2, done.stderr[-2000:]
    for products, left in found:
        assert int(products) >= 1, "this Triton multiplies another way: look at it anew"
        assert set(left.split()) == {"0"}
