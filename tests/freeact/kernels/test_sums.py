"""What Triton makes of a product's sum, compiled for Hopper without a GPU: the same for every number of rows."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.freeact.kernels.test_waits import BEFORE


SCRIPT = (
    BEFORE
    + """
def compiled(self, *args, grid, warmup, **options):
    made = run(self, *args, grid=grid, warmup=True, **options)
    print("KERNEL", made.asm["ptx"])
    return made
JITFunction.run = compiled
from optimum_freeact.kernels import launcher
launcher._compiled = type("Forgetful", (dict,), {"__setitem__": lambda *args: None})()
from optimum_freeact.kernels import w4_triton
from optimum_freeact.kernels.reference import Rows
from tests.freeact.kernels.cases import random_weight
for n in (2048, 683):  # divisible by sixteen, which the compiler makes use of, and not
    rows = Rows(torch.empty(n, 576, dtype=torch.int8), torch.empty(3, n), None)
    w4_triton.w4_linear(rows, torch.zeros(n, dtype=torch.int64), random_weight(3072, 576, rank=0, n_bias=3), torch.bfloat16)
"""
)


def forms(ptx):
    """How often the integer product is what is multiplied and added at once, and how often what is rounded before."""
    made = {}
    for line in ptx.splitlines():
        found = re.match(r"\s*(?:@%p\d+ )?([a-z0-9._]+)\s+(.*);", line)
        registers = re.findall(r"%r\d+", found[2]) if found else []
        if registers:
            made.setdefault(registers[0], (found[1], registers[1:]))

    def is_product(register):  # a number made of a difference: the sum of the row's codes is taken off the product
        operation, given = made.get(register, ("", []))
        return operation.startswith("cvt.rn.f32.s32") and made.get(given[0], ("", []))[0].startswith("sub")

    counted = Counter()
    for operation, given in made.values():
        if operation.startswith("fma.rn.f32") and made.get(given[2], ("", []))[0] == "mul.f32":
            counted["at once" if any(map(is_product, given[:2])) else "before"] += 1
    return counted


def test_a_sum_of_two_products_is_rounded_the_same_way_for_every_number_of_rows():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'hf-concord[kernels]'")

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [forms(ptx) for ptx in done.stdout.split("KERNEL ")[1:]]
    assert len(found) == 2
    assert found[0] == found[1] == Counter({"at once": 32})  # numbers of a thread
