"""How often a block runs and its inputs are measured: once each, whatever is corrected; and in what precision it learns."""

import pytest
import torch

from optimum_freeact import quantize
from optimum_freeact.calibration.precision import products
from optimum_freeact.moments import Moments
from tests.helpers.quantized import logits, settings
from tests.helpers.tiny_models import tiny


BLOCKS, GROUPS = 2, 4
PUBLISHED = {"preset": "quarot", "sequential": True, "rounding_order": "columns", "rounding_noise": False}


@pytest.mark.parametrize(
    "changes", [{}, {"error_correction": True}, PUBLISHED], ids=["plain", "corrected", "published"]
)
def test_every_input_is_measured_once(changes, monkeypatch):
    seen, update = [], Moments.update
    monkeypatch.setattr(Moments, "update", lambda self, x, *more: (seen.append(len(x)), update(self, x, *more))[1])
    config = settings(**changes)
    quantize(tiny("llama", num_hidden_layers=BLOCKS), config)
    tokens = config.n_samples * config.seq_len
    assert sum(seen) == BLOCKS * GROUPS * tokens


def test_the_last_product_of_a_block_runs_only_where_its_output_is_needed(monkeypatch):
    model, calls = tiny("llama", num_hidden_layers=BLOCKS), []
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    config = settings(error_correction=True)
    quantize(model, config)
    batches = -(-config.n_samples // config.batch_size)
    assert len(calls) == BLOCKS * (batches + 1)  # the full-precision stream, and the last batch's reference


def test_nothing_is_corrected_where_nothing_is_lost():
    model = tiny("llama")
    wanted = logits(model)
    found = logits(quantize(model, settings(error_correction=True, weight_bits=16, activation_bits=16)))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_precision_of_products_comes_back_and_changes_on_a_gpu_only():
    before = torch.get_float32_matmul_precision()
    with products("high", torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
    with products("high", torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        with products("highest", torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
