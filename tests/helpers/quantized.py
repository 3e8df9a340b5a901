"""Tiny models quantized in a moment, and what tests ask them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_freeact.api import quantize
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.linear import FreeActLinear
from tests.helpers.tiny_models import sample_ids, tiny


ROOT = Path(__file__).resolve().parents[2]


def settings(preset: str = "freeact", **changes) -> FreeActConfig:
    """A config that calibrates a tiny model in a fraction of a second."""
    data = {"dataset": sample_ids(6, 24, seed=7), "n_samples": 6, "seq_len": 24, "batch_size": 3, "progress": False}
    return FreeActConfig(preset, **{**data, **changes})


def quantized(family: str = "llama", model: dict | None = None, **changes) -> nn.Module:
    """`tiny(family, **model)` quantized with `settings(**changes)`."""
    return quantize(tiny(family, **(model or {})), settings(**changes))


def reload(folder, **arguments) -> nn.Module:
    """The saved model again, with the attention of `tiny` (others differ in the last bits)."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **arguments)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor | None = None, **arguments) -> torch.Tensor:
    """Logits of fixed ids."""
    return model(input_ids=sample_ids(2, 12, seed=5) if ids is None else ids, **arguments).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over that of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def fresh_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a new interpreter that sees this repository; its last line may be JSON. (`forked.run` is faster.)"""
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd="/", check=False)


def answer(run: subprocess.CompletedProcess) -> dict:
    """The JSON object that a fresh interpreter printed last."""
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def own_tensors(model):
    """Tensors of the quantized modules."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, (FreeActLinear, FreeActInput))
        for key, tensor in module.state_dict().items()
    }
