"""Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before they are imported."""

import importlib.util
import os

import pytest
import torch

from tests.helpers.interpreter import spare_repetition


HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    spare_repetition()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    if not HAS_TRITON:
        pytest.skip("triton is not installed: pip install 'hf-concord[kernels]'")
    return DEVICE
