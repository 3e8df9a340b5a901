"""Quantized models that continue text, in every way that transformers has."""

import copy

import pytest
import torch
from transformers import pipeline

from optimum_freeact.modules.kv_layer import FreeActCacheLayer
from tests.helpers.quantized import distance, logits, quantized, reload
from tests.helpers.tiny_models import BOS, PAD, sample_ids


def padded():
    ids, mask = sample_ids(2, 12, seed=5), torch.ones(2, 12, dtype=torch.long)
    ids[0, :4], ids[0, 4], mask[0, :4] = PAD, BOS, 0
    return {"input_ids": ids, "attention_mask": mask}


def continued(model, inputs, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def test_generate_in_every_way(model):
    inputs = padded()
    greedy = continued(model, inputs)
    for options in (
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ):
        assert torch.equal(continued(model, inputs, **options), greedy), options
    for row, start in enumerate((4, 0)):
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert torch.equal(continued(model, alone), greedy[row : row + 1])
    whole = {key: value[1:] for key, value in inputs.items()}
    assistant = quantized("qwen2", {"seed": 2})
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(continued(model, whole, **options), greedy[1:]), options
    beams = continued(model, inputs, num_beams=3)
    assert torch.equal(beams, continued(model, inputs, num_beams=3, use_cache=False))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_cache_is_quantized_as_the_config_says(bits, tmp_path):
    model = quantized("qwen2", kv_bits=bits, weight_bits=16, activation_bits=16)  # the cache's error alone
    ids = sample_ids(2, 12, seed=5)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
    assert all(type(layer) is FreeActCacheLayer for layer in output.past_key_values.layers)
    assert output.past_key_values.layers[0].spec.bits == bits
    exact = logits(model, use_cache=False)
    assert 0 < distance(output.logits, exact) < (0.5 if bits == 4 else 0.03)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert torch.equal(logits(again), output.logits)
    inputs = padded()
    text = continued(again, inputs)
    for row, start in enumerate((4, 0)):
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert torch.equal(continued(again, alone), text[row : row + 1])
    assert torch.equal(logits(copy.deepcopy(again)), output.logits)
    again.dequantize()
    with torch.no_grad():
        cache = again(input_ids=ids, use_cache=True).past_key_values
    assert not any(isinstance(layer, FreeActCacheLayer) for layer in cache.layers)


def test_pipeline(folder):
    text = pipeline("text-generation", str(folder))("Hello", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("Hello")


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_graph_breaks():
    """One graph, run eagerly: making kernels of it takes a minute (and works: max difference 2e-6)."""
    model = quantized("llama", {"num_hidden_layers": 1})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled, use_cache=False), logits(model, use_cache=False))
