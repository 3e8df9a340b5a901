"""The installed cache inside models: every way of calling one gives what a single quantized prefill gives."""

import copy
import inspect

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from optimum_freeact.cache_name import cache_name
from optimum_freeact.modules.kv_cache import convert_cache, install_kv_cache, row_starts
from optimum_freeact.modules.kv_layer import FreeActCacheLayer, FreeActSlidingWindowLayer
from optimum_freeact.modules.kv_store import CacheSpec
from tests.helpers.tiny_decoders import FAMILIES, prompt, tiny_decoder


CLOSE = {"rtol": 0, "atol": 1e-9}
SPEC = CacheSpec(4, rotate=True)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, 8])
def test_decoding_equals_one_prefill(family, bits):
    model, ids = tiny_decoder(family), prompt(tokens=14)
    exact = model(ids).logits
    install_kv_cache(model, CacheSpec(bits, rotate=True))
    whole = model(ids).logits
    assert (whole - exact).abs().max() > 1e-4
    cache, pieces = None, []
    for piece in ids.split((3, 1, 1, 5, 1, 3), dim=1):
        output = model(piece, past_key_values=cache)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_eight_bits_are_closer_than_four_and_both_close(key_value_heads):
    model, ids = tiny_decoder("llama", key_value_heads), prompt(batch=8, tokens=32)
    exact = model(ids).logits
    errors = {}
    for bits in (4, 8):
        install_kv_cache(model, CacheSpec(bits))
        errors[bits] = ((model(ids).logits - exact).square().mean() / exact.square().mean()).item()
    assert errors[8] < 0.02 * errors[4]  # 16 times finer: 1/256 of the energy, were logits linear in the states
    assert 0 < errors[4] < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_means_are_added_back(family):
    """Means far from zero change only the grids: eight bits around them give nearly the same logits."""
    model, ids = tiny_decoder(family), prompt()
    exact = model(ids).logits
    means = [torch.randn(2, 16) for _ in range(2)]
    install_kv_cache(model, CacheSpec(8, key_mean=means, value_mean=means))
    with_means = model(ids).logits
    install_kv_cache(model, CacheSpec(8))
    without = model(ids).logits
    scale = exact.square().mean().sqrt()
    assert 0 < (with_means - without).square().mean().sqrt() < 0.05 * scale
    assert (with_means - exact).square().mean().sqrt() < 0.05 * scale


def test_sixteen_bits_install_nothing():
    model, ids = tiny_decoder("llama"), prompt()
    exact = model(ids).logits
    install_kv_cache(model, SPEC)
    handle = install_kv_cache(model, CacheSpec(16))  # takes the earlier one off
    output = model(ids)
    assert torch.equal(output.logits, exact)
    assert not handle.decoder._forward_pre_hooks
    assert [type(layer) for layer in output.past_key_values.layers] == [DynamicLayer] * 2


def test_installing_twice_keeps_the_last_and_remove_takes_it_off():
    model, ids = tiny_decoder("llama"), prompt()
    exact = model(ids).logits
    install_kv_cache(model, CacheSpec(8))
    once = model(ids).logits
    install_kv_cache(model, SPEC)
    install_kv_cache(model, CacheSpec(8))
    handle = install_kv_cache(model, CacheSpec(8))
    assert len(handle.decoder._forward_pre_hooks) == 1
    assert torch.equal(model(ids).logits, once)
    handle.remove()
    handle.remove()
    assert torch.equal(model(ids).logits, exact)
    assert not handle.decoder._forward_pre_hooks_with_kwargs


def test_other_hooks_stay():
    model = tiny_decoder("llama")
    model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    install_kv_cache(model, SPEC).remove()
    assert len(model.get_decoder()._forward_pre_hooks) == 1


def test_a_copied_model_has_its_own_cache():
    model, ids = tiny_decoder("llama"), prompt()
    handle = install_kv_cache(model, CacheSpec(4, key_mean=[torch.zeros(2, 16)] * 2))
    quantized = model(ids).logits
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(twin(ids).logits, quantized)
    assert not torch.equal(model(ids).logits, quantized)


def test_every_way_to_call_the_decoder():
    model, ids = tiny_decoder("llama"), prompt()
    decoder = install_kv_cache(model, SPEC).decoder
    expected = decoder(input_ids=ids).last_hidden_state
    assert torch.equal(decoder(ids).last_hidden_state, expected)
    assert torch.equal(decoder(ids, torch.ones_like(ids), None, DynamicCache()).last_hidden_state, expected)
    embedded = decoder(inputs_embeds=decoder.embed_tokens(ids))
    assert torch.equal(embedded.last_hidden_state, expected)
    assert torch.equal(decoder(ids, past_key_values=DynamicCache(), use_cache=False).last_hidden_state, expected)
    assert decoder(ids, use_cache=False).past_key_values is None
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        decoder()
    assert list(inspect.signature(decoder.forward).parameters)[3] == cache_name(decoder)  # what positions rely on


@pytest.mark.parametrize("family", FAMILIES)
def test_lazily_built_caches_are_converted(family):
    """A `DynamicCache` made without a configuration has no windows; the mask alone limits what is seen."""
    model, ids = tiny_decoder(family), prompt()
    install_kv_cache(model, SPEC)
    cache = DynamicCache()
    lazily = model(ids, past_key_values=cache).logits
    assert [type(layer) for layer in cache.layers] == [FreeActCacheLayer] * 2
    torch.testing.assert_close(lazily, model(ids).logits, **CLOSE)


def test_the_layers_of_each_family():
    kinds = {
        "llama": [FreeActCacheLayer] * 2,
        "mistral": [FreeActSlidingWindowLayer] * 2,
        "gemma3": [FreeActSlidingWindowLayer, FreeActCacheLayer],
    }
    for family, expected in kinds.items():
        model = tiny_decoder(family)
        install_kv_cache(model, SPEC)
        layers = model(prompt()).past_key_values.layers
        assert [type(layer) for layer in layers] == expected
        assert all(layer.keys.dtype == torch.uint8 for layer in layers)


def test_other_caches_are_left_alone(caplog):
    model, ids = tiny_decoder("llama"), prompt()
    exact = model(ids).logits
    filled = model(ids[:, :4]).past_key_values
    static = StaticCache(config=model.config, max_cache_len=16)
    foreign = Cache(layers=[DynamicLayer(), DynamicLayer()])
    install_kv_cache(model, SPEC)
    torch.testing.assert_close(model(ids[:, 4:], past_key_values=filled).logits, exact[:, 4:], **CLOSE)
    assert [type(layer) for layer in filled.layers] == [DynamicLayer] * 2
    for cache in (static, foreign):
        kinds = [type(layer) for layer in cache.layers]
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, exact, **CLOSE)
        assert [type(layer) for layer in cache.layers] == kinds
    said = [record.getMessage() for record in caplog.records if "not quantized" in record.getMessage()]
    assert len(said) == 1  # once, not in every step
    assert said[0].startswith("kv_bits=4: this DynamicCache is left as it is")
    model(ids)
    model(ids, use_cache=False)
    assert len(caplog.records) == 1


def test_a_cache_that_is_quantized_is_not_warned_of(caplog):
    model, ids = tiny_decoder("llama"), prompt()
    install_kv_cache(model, SPEC)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    model(ids, past_key_values=DynamicCache(config=model.config))
    model(ids, use_cache=False)
    assert "not quantized" not in caplog.text


def test_conversion_keeps_windows_recording_and_layers_of_other_kinds():
    model = tiny_decoder("gemma3")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    cache.layers.append(marker := type("Other", (DynamicLayer,), {})())
    assert convert_cache(cache, SPEC, 2)
    assert (cache.layers[0].sliding_window, cache.layers[0].record_past) == (6, True)
    assert cache.layers[1].layer_idx == 1
    assert cache.layers[2] is marker
    kept = list(cache.layers)
    assert convert_cache(cache, SPEC, 2)
    assert all(now is before for now, before in zip(cache.layers, kept))
    plain = DynamicCache(config=model.config)
    plain.layers = [marker]
    assert not convert_cache(plain, SPEC, 2)
    assert isinstance(DynamicCache(config=model.config).layers[0], DynamicSlidingWindowLayer)


def test_training_sees_quantized_states_and_reaches_every_weight():
    model, ids = tiny_decoder("llama"), prompt()
    exact = model(ids).logits
    install_kv_cache(model, SPEC)
    model.train()
    with torch.enable_grad():
        output = model(ids, labels=ids)
        output.loss.backward()
    assert not torch.equal(output.logits, exact)
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
    model.get_decoder().gradient_checkpointing = True
    with torch.enable_grad():
        assert model(ids).past_key_values is None  # as without us


def test_half_precision_model():
    model, ids = tiny_decoder("qwen2", dtype=torch.bfloat16), prompt()
    install_kv_cache(model, CacheSpec(8, rotate=True))
    output = model(ids)
    assert output.logits.dtype == torch.bfloat16
    assert output.logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, attention_mask=torch.ones_like(ids)).shape == (2, 14)


def test_row_starts():
    two = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
    assert row_starts(two, 4, 4).tolist() == [2, 0, 4, 1]
    visible = two.bool()[:, None, None, :].expand(-1, 1, 3, -1)
    assert row_starts(visible, 4, 4).tolist() == [2, 0, 4, 1]
    assert row_starts({"full_attention": visible, "sliding_attention": None}, 4, 4).tolist() == [2, 0, 4, 1]
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    assert row_starts(additive, 4, 4).tolist() == [2, 0, 4, 1]
    assert row_starts(visible[:1], 3, 4).tolist() == [2, 2, 2]  # one mask for all rows
    assert row_starts(None, 2, 4).tolist() == [0, 0]
    assert row_starts({"sliding_attention": visible}, 2, 4).tolist() == [0, 0]
    assert row_starts(two, 4, 5) is None
    assert row_starts(two[0], 4, 4) is None
    assert row_starts("flex", 4, 4) is None


def test_models_without_such_a_cache_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model.*bits=16"):
        install_kv_cache(t5, SPEC)
    with pytest.raises(ValueError, match="Linear of Linear takes neither cache nor past_key_values.*bits=16"):
        install_kv_cache(torch.nn.Linear(2, 2), SPEC)
    with pytest.raises(ValueError, match="key_mean has 3 entries, LlamaForCausalLM has 2 layers"):
        install_kv_cache(tiny_decoder("llama"), CacheSpec(key_mean=[None] * 3))
