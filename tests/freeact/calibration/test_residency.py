"""One block at a time: on the calibration device, in its statistics, and in what is left of the full-precision weights."""

import gc
import weakref

import pytest
import torch
from torch import nn

from optimum_freeact import quantize
from optimum_freeact.calibration import blockwise
from optimum_freeact.modules.surgery import quantized_linears
from tests.helpers.peak import PeakBytes
from tests.helpers.quantized import settings
from tests.helpers.tiny_models import tiny


KINDS = [{}, {"preset": "flatquant", "epochs": 1}]


@pytest.fixture
def collected(monkeypatch):
    """Garbage is collected before each block, and at no other time: when Python does it hangs on all that ran before."""
    fit = blockwise._quantize_block
    monkeypatch.setattr(blockwise, "_quantize_block", lambda *args: (gc.collect(), fit(*args))[1])
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.usefixtures("collected")
def test_memory_does_not_grow_with_the_number_of_blocks(changes):
    """What is added for each block is less than its full-precision weights, let alone a matrix of moments."""
    size, peaks = {"hidden_size": 64, "intermediate_size": 384}, {}
    for layers in (2, 5):
        model = tiny("llama", num_hidden_layers=layers, **size)
        with PeakBytes() as peak:
            quantize(model, settings(**changes))
        peaks[layers] = peak.bytes
    block = sum(p.numel() * p.element_size() for p in tiny("llama", **size).model.layers[0].parameters())
    assert peaks[2] > 8 * block  # statistics of one block are large
    assert (peaks[5] - peaks[2]) / 3 < 0.8 * block
    assert peaks[5] < 1.2 * peaks[2]


def test_blocks_visit_the_device_one_after_the_other(monkeypatch):
    model = tiny("llama", num_hidden_layers=3)
    blocks, moves = list(model.model.layers), []
    plain = nn.Module.to

    def to(self, *args, **kwargs):
        if self in blocks:
            moves.append((blocks.index(self), str(args[0])))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    fit = blockwise._quantize_block
    monkeypatch.setattr(
        blockwise,
        "_quantize_block",
        lambda block, *args: (moves.append((blocks.index(block), "fit")), fit(block, *args))[1],
    )
    quantize(model, settings(calibration_device="cpu"))
    assert moves == [(index, what) for index in range(3) for what in ("cpu", "fit", "cpu")]


def test_nothing_holds_a_block_s_full_precision_weights_when_the_next_is_fitted(monkeypatch):
    model = tiny("llama", num_hidden_layers=3)
    weights = [weakref.ref(block.mlp.up_proj.weight) for block in model.model.layers]
    alive, fit = [], blockwise._quantize_block

    def watched(*args):
        gc.collect()
        alive.append([weight() is not None for weight in weights])
        return fit(*args)

    monkeypatch.setattr(blockwise, "_quantize_block", watched)
    quantize(model, settings())
    assert alive == [[True, True, True], [False, True, True], [False, False, True]]
    assert all(module.weight.dtype == torch.uint8 for module in quantized_linears(model).values())
