"""Prompts laid end to end must be encoded as if each were alone."""

import random
import statistics

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.mlc.conftest import tiny_llama
from tests.mlc.test_early_exit import SMALL, batch, small
from trl_mlc.early_exit import decoder_of, encode_prompts
from trl_mlc.packing import encode_packed, in_few_shapes, keeps_apart, lay_out, rows_at_once


LENGTHS = [9, 4, 7, 2, 4]  # of `batch`


def test_every_prompt_lies_whole_in_one_row_and_little_is_left_over():
    lengths = [8 + (i * 37) % 151 + (i % 10) * (i % 7) for i in range(160)]
    rows, width = lay_out(lengths)
    assert sorted(i for row in rows for i in row) == list(range(160))
    assert max(sum(lengths[i] for i in row) for row in rows) == width <= 256
    assert len(rows) * width < 1.05 * sum(lengths) < 0.6 * len(lengths) * max(lengths)
    assert lay_out([5, 3]) == ([[0, 1]], 8)
    assert lay_out([500, 3, 250]) == ([[0], [2, 1]], 500)
    assert lay_out([1]) == ([[0]], 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text"])
def test_packed_states_and_gradients_are_those_of_padded_prompts(model_type, attention, monkeypatch):
    monkeypatch.setattr("trl_mlc.packing.SHORTEST_ROW", 12)
    model = small(model_type)  # in float32: eager attention in float64 makes NaN of rows that are all padding
    model.set_attn_implementation(attention)
    decoder = decoder_of(model)
    ids, mask = batch()
    assert len(lay_out(LENGTHS, 12).rows) > 1
    for layer in range(5):
        assert keeps_apart(decoder, layer)
        for pooling in ("last", "mean"):
            padded = encode_prompts(decoder, ids, mask, layer, pooling)
            packed = encode_packed(decoder, ids, LENGTHS, layer, pooling)
            assert torch.allclose(packed, padded, atol=1e-5), (layer, pooling)
    gradients = []
    for states in (encode_prompts(decoder, ids, mask, 3), encode_packed(decoder, ids, LENGTHS, 3)):
        model.zero_grad()
        states.square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-5)


def test_on_a_gpu_batches_have_few_shapes():
    shapes, filled = set(), []
    for seed in range(300):
        draw = random.Random(seed)
        lengths = [min(512, max(4, round(90 * draw.lognormvariate(0, 0.6)))) for _ in range(16 * draw.randint(3, 12))]
        rows, width = in_few_shapes(lengths)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in row) for row in rows) <= width
        last = len(rows) % rows_at_once(width)
        shapes |= {(rows_at_once(width), width)} if len(rows) > last else set()
        shapes |= {(last, width)} if last else set()
        filled.append(sum(lengths) / (len(rows) * width))
    assert len(shapes) <= 26
    assert statistics.fmean(filled) > 0.92
    assert in_few_shapes([5, 9]) == ([[1, 0]], 64)
    assert in_few_shapes([600, 300]) == ([[0, 1]], 1024)


def test_empty_rows_change_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr("trl_mlc.packing.lay_out", lambda lengths, shortest: ([[0, 3], [], [2, 1, 4], []], 16))
    decoder = decoder_of(tiny_llama(tokenizer))
    ids, mask = batch()
    assert torch.allclose(encode_packed(decoder, ids, LENGTHS, 3), encode_prompts(decoder, ids, mask, 3), atol=1e-5)


@pytest.mark.parametrize("most", [1, 13, 26])
def test_several_forwards_are_the_same_too(most, tokenizer, monkeypatch):
    monkeypatch.setattr("trl_mlc.packing.SHORTEST_ROW", 12)
    decoder = decoder_of(tiny_llama(tokenizer))
    ids, mask = batch()
    once = encode_packed(decoder, ids, LENGTHS, 3)
    monkeypatch.setattr("trl_mlc.packing.MOST_TOKENS", most)
    assert torch.allclose(encode_packed(decoder, ids, LENGTHS, 3), once, atol=1e-5)


def test_a_row_as_wide_as_all_prompts_is_the_same_too(tokenizer):
    decoder = decoder_of(tiny_llama(tokenizer).double())
    ids, mask = batch()
    assert torch.allclose(encode_packed(decoder, ids, LENGTHS, 3), encode_prompts(decoder, ids, mask, 3), atol=1e-5)


def test_models_that_mix_the_prompts_of_a_row_are_found_out(tokenizer, monkeypatch):
    decoder = decoder_of(tiny_llama(tokenizer))
    assert keeps_apart(decoder, 2)
    original = type(decoder).forward

    def blind(self, *args, position_ids=None, **kwargs):  # ignores what it is told about positions
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(decoder), "forward", blind)
    assert not keeps_apart(decoder, 2)
    monkeypatch.undo()
    decoder.config._attn_implementation = "flash_attention_2"
    assert not keeps_apart(decoder, 2)


def test_a_recurrent_model_is_found_out():
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    assert not keeps_apart(model.get_decoder() if hasattr(model, "get_decoder") else model.backbone, 2)


@pytest.mark.parametrize("model_type", list(SMALL))
def test_trying_leaves_the_model_as_it_was(model_type):
    model = small(model_type).train()
    state = torch.get_rng_state()
    keeps_apart(decoder_of(model), 3)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
