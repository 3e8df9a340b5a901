import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from optimum_freeact.api import quantize
from optimum_freeact.modules.kv_buffers import NAME
from optimum_freeact.modules.kv_cache import install_kv_cache
from optimum_freeact.modules.kv_means import cache_means, rotary_frequencies, turn_back
from optimum_freeact.modules.kv_store import CacheSpec
from tests.helpers.quantized import settings
from tests.helpers.tiny_decoders import prompt, tiny_decoder
from tests.helpers.tiny_models import tiny


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_turning_back_undoes_the_rotary_embedding_of_transformers():
    decoder = tiny_decoder("llama").get_decoder()
    keys = torch.randn(1, 2, 30, 16, dtype=torch.float64)
    cos, sin = decoder.rotary_emb(keys, torch.arange(30)[None])
    turned = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    assert (turned - keys).abs().max() > 1
    back = turn_back(turned, rotary_frequencies(decoder)[0])
    torch.testing.assert_close(back, keys, rtol=0, atol=1e-5)  # transformers' angles are float32
    torch.testing.assert_close(turn_back(keys, torch.ones(3))[..., 6:], keys[..., 6:])


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_means_are_those_of_the_projections(family):
    model, samples, seen = tiny_decoder(family), prompt(3, 25), {}
    for name in ("k_proj", "v_proj"):
        projection = getattr(model.model.layers[1].self_attn, name)
        projection.register_forward_hook(lambda _m, _i, output, name=name: seen.setdefault(name, []).append(output))
    means = cache_means(model, samples, sink_tokens=2)
    for name, mean in (("k_proj", means.key_mean[1]), ("v_proj", means.value_mean[1])):
        expected = torch.cat([output[:, 2:] for output in seen[name]]).mean((0, 1)).view(2, 16)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(mean.double(), expected, rtol=0, atol=1e-5)


def test_means_lower_the_error_of_biased_keys():
    """And those before the rotary embedding more than those of the keys as cached."""
    model, samples, ids = tiny_decoder("qwen2"), prompt(8, 30), prompt(8, 30)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias *= 5
    exact, means = model(ids).logits, cache_means(model, samples)
    cached = DynamicCache(config=model.config)
    model(samples, past_key_values=cached)
    as_cached = [layer.keys[:, :, 1:].mean((0, 2)) for layer in cached.layers]
    errors = []
    for options in ({}, {"key_mean": as_cached, "value_mean": means.value_mean}, means._asdict()):
        install_kv_cache(model, CacheSpec(4, **options))
        errors.append((model(ids).logits - exact).square().mean().item())
    assert errors[2] < 0.5 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_layer_types_have_their_own_frequencies():
    decoder = tiny_decoder("gemma3").get_decoder()
    sliding, full = rotary_frequencies(decoder)
    assert torch.equal(sliding, decoder.rotary_emb.sliding_attention_inv_freq.double())
    assert torch.equal(full, decoder.rotary_emb.full_attention_inv_freq.double())
    assert not torch.equal(sliding, full)


def test_without_known_frequencies_the_mean_is_that_of_the_cached_keys(monkeypatch):
    model, samples = tiny_decoder("llama"), prompt(2, 9)
    cached = torch.cat([model(row[None]).past_key_values.layers[0].keys for row in samples])
    monkeypatch.setattr("optimum_freeact.modules.kv_means.rotary_frequencies", lambda decoder: [None, None])
    means = cache_means(model, samples)
    torch.testing.assert_close(means.key_mean[0].double(), cached[:, :, 1:].mean((0, 2)), rtol=0, atol=1e-6)
    assert means.key_frequencies == [None, None]
    model.get_decoder().rotary_emb = None
    monkeypatch.undo()
    assert rotary_frequencies(model.get_decoder()) == [None, None]


def test_padding_does_not_count():
    model, ids = tiny_decoder("llama"), prompt(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 14:] = 0
    mask[1, :3] = 0  # the sink is the first real token there, and not at the start
    found = cache_means(model, [{"input_ids": ids, "attention_mask": mask}])
    values = []
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _i, output: values.append(output))
    model(input_ids=ids, attention_mask=mask)
    expected = torch.cat([values[0][0, 1:14], values[0][1, 4:]]).mean(0).view(2, 16)
    torch.testing.assert_close(found.value_mean[1].double(), expected, rtol=0, atol=1e-5)


def test_a_loud_token_has_no_more_say_than_the_limit_gives_it():
    model, ids = tiny_decoder("llama"), prompt(1, 40)

    def louder(_module, _inputs, output):
        return output.index_fill(1, torch.tensor([7]), 0.0) + 100.0 * (torch.arange(40) == 7)[None, :, None]

    quiet = cache_means(model, ids).value_mean[1]
    model.model.layers[1].self_attn.v_proj.register_forward_hook(louder)
    plain = cache_means(model, ids).value_mean[1]
    limited = cache_means(model, ids, limit=2.0).value_mean[1]
    assert (plain - quiet).norm() > 3 * quiet.norm()
    assert (limited - quiet).norm() < 0.5 * quiet.norm()


@pytest.mark.parametrize("loud", [False, True])
def test_values_keep_their_zero_where_loud_tokens_stand_inside_a_sequence(loud):
    model = tiny("llama")
    if loud:
        model.config.mask_token_id = 103
    model = quantize(model, settings(kv_bits=4))
    assert model.hf_quantizer.quantization_config.loudest == (2.0 if loud else None)
    means = model.get_decoder().get_submodule(NAME)
    for layer in range(2):
        assert bool(getattr(means, f"key_{layer}").any())
        assert bool(getattr(means, f"value_{layer}").any()) != loud


def test_errors():
    model = tiny_decoder("llama")
    for samples in (prompt(2, 1), prompt(0, 9), prompt(2, 9)[0]):
        with pytest.raises(ValueError, match="more than 1 tokens each, got"):
            cache_means(model, samples)
    install_kv_cache(model, CacheSpec(4))
    with pytest.raises(ValueError, match=r"has a quantized KV cache installed; remove\(\)"):
        cache_means(model, prompt())
