"""Discovered types: clusters of ids as types, static, saved with the checkpoint, exact as any other type."""

import pytest
import torch

from optimum_freeact.api import quantize
from optimum_freeact.calibration.discover import cluster_ids
from tests.freeact.test_type_rules import IDS, MASK, masked_llama
from tests.helpers.quantized import logits, reload, settings
from tests.helpers.tiny_models import sample_ids, tiny


def test_ids_that_are_used_alike_share_a_cluster_and_unseen_ids_follow_their_embeddings():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.eye(3)[torch.arange(30) % 3] + 0.05 * torch.randn(30, 3, generator=generator)
    ids = torch.randint(0, 20, (400,), generator=generator)  # 20 to 29 are never seen
    inputs = [5 * torch.eye(3)[ids % 3] @ torch.randn(3, 8, generator=generator) + 0.1 * torch.randn(400, 8)]
    table = cluster_ids(ids, inputs, embeddings, 3)
    assert table.shape == (30,)
    assert all(len(table[torch.arange(30) % 3 == k].unique()) == 1 for k in range(3))
    assert len(table.unique()) == 3
    with pytest.raises(ValueError, match="discovered_types=50"):
        cluster_ids(ids, inputs, embeddings, 50)


def test_a_model_with_discovered_types(tmp_path):
    model = quantize(masked_llama(), settings(discovered_types=4))
    config = model.hf_quantizer.quantization_config
    assert config.token_types == ["text", "sink", "mask", "text.1", "text.2", "text.3"]
    got = logits(model, IDS)
    types = model._freeact_state.types
    assert types[0, 0] == types[1, 0] == config.token_types.index("sink")
    assert (types[IDS == MASK] == config.token_types.index("mask")).all()
    text = types[(IDS != MASK) & (torch.arange(6) > 0)]
    assert set(text.tolist()) <= {0, 3, 4, 5}
    assert torch.equal(types[1, 2:5], types[1, 2].expand(3))  # the same id thrice
    source = model.model.layers[0].self_attn.q_proj.source
    assert source.mean.shape == (6, 64)
    assert source.clip[3:].unique().tolist() == [source.clip[0].item()]
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert torch.equal(logits(again, IDS), got)
    assert torch.equal(again._freeact_state.types, types)


def test_means_of_clusters_remove_energy_and_stay_exact():
    """More is subtracted than with one mean of text, and without rounding the model is what it was."""
    shares = []
    for k in (0, 8):
        model = quantize(tiny("llama"), settings(discovered_types=k, low_rank=0))
        shares.append(sum(i.mean_share for r in model._freeact_records for i in r.inputs))
    assert shares[1] > 1.2 * shares[0]
    exact = quantize(tiny("llama"), settings(discovered_types=8, weight_bits=16, activation_bits=16))
    ids = sample_ids(2, 12, seed=5)
    torch.testing.assert_close(logits(exact, ids), logits(tiny("llama"), ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("k", [1, 257, -1, 2.5])
def test_wrong_numbers_are_named(k):
    with pytest.raises(ValueError, match="discovered_types"):
        settings(discovered_types=k)
