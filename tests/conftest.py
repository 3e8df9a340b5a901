"""Fixtures shared by all tests: seeds, and the real assets (skipped with a reason when they cannot be fetched)."""

import os
from pathlib import Path

import pytest
import torch

from tools.assets import Unavailable, fetch


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a model hub
if not torch.cuda.is_available():  # Triton decides when it is first imported, whoever imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")


#: Files that take long, for their number of tests or for one of them; longest first. One worker would end alone with them.
LONG = (
    "test_accuracy_run.py",
    "test_families.py",
    "test_lm_eval.py",
    "test_real_model.py",
    "test_kv_packed.py",
    "test_mixed_batches.py",
    "test_trust.py",
    "test_pipeline.py",
    "test_two_stacks.py",
    "test_groups_triton.py",
    "test_layering.py",
    "test_kills.py",
    "test_documentation.py",
    "test_push_to_hub.py",
    "test_ddp.py",
    "test_trainers.py",
    "test_quantizer.py",
    "test_fresh_process.py",
    "test_determinism.py",
    "test_journey.py",
)


def pytest_collection_modifyitems(items):
    """Order files; with `--no-loadscope-reorder` the workers take them like this."""
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """torch.compile without what other tests left it: it gives up on code that it compiled too often, of transformers' too."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def asset_or_skip(name: str) -> Path:
    """Folder of an asset; skips with the reason when it cannot be had, fails instead under `ASSETS_REQUIRED=1`."""
    try:
        return fetch(name)
    except Unavailable as error:
        if os.environ.get("ASSETS_REQUIRED") == "1":
            raise
        pytest.skip(f"asset {name!r} not available: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return asset_or_skip("smollm2")


@pytest.fixture(scope="session")
def handbook() -> Path:
    return asset_or_skip("handbook") / "text.txt"


@pytest.fixture(scope="session")
def brown() -> Path:
    return asset_or_skip("brown") / "text.txt"
