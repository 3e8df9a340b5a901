"""Every kernel file can be read: most are imported only where a GPU is, long after a calibration has begun."""

import importlib
from pathlib import Path

import pytest

import optimum_freeact.kernels


FILES = sorted(
    path.stem for path in Path(optimum_freeact.kernels.__file__).parent.glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", FILES)
def test_it_can_be_read(name, device):  # noqa: ARG001
    importlib.import_module(f"optimum_freeact.kernels.{name}")
