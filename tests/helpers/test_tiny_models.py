"""The tiny models are what the other tests believe them to be."""

import pytest
import torch
from torch import nn

from tests.helpers.tiny_models import (
    BOS,
    CHARACTERS,
    DECODERS,
    EXPERTS,
    FAMILIES,
    KNOWN,
    VOCAB_SIZE,
    plant_outliers,
    plant_sink,
    sample_ids,
    tiny,
    tiny_tokenizer,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_in_float32_and_is_seeded(family):
    before = torch.get_rng_state()
    model, again, other = tiny(family), tiny(family), tiny(family, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        logits = [each(input_ids=sample_ids(2, 20)).logits for each in (model, again, other)]
    assert logits[0].shape == (2, 20, VOCAB_SIZE)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert 0.2 < logits[0].std() < 5  # neither constant nor saturated


@pytest.mark.parametrize("family", DECODERS + EXPERTS + ("gpt2",))
def test_decoders_are_causal_and_every_block_matters(family):
    model, ids = tiny(family), sample_ids(2, 20)
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] - 6 + 1) % len(CHARACTERS) + 6
    with torch.no_grad():
        first, second = model(input_ids=ids).logits, model(input_ids=changed).logits
        torch.testing.assert_close(first[:, :10], second[:, :10], rtol=1e-4, atol=1e-5)
        assert (first[:, 10:] - second[:, 10:]).abs().amax() > 0.1
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            kept = parameter.clone()
            parameter.copy_(kept.roll(1, 0))
            moved = (model(input_ids=ids).logits - first).abs().amax()
            parameter.copy_(kept)
            assert moved > 1e-3


def test_families_have_what_the_tests_need():
    def kinds(family):
        return {type(module) for module in tiny(family).base_model.modules()}

    for family in DECODERS:
        assert any(isinstance(module, nn.Linear) for module in tiny(family).base_model.modules())
    assert nn.Linear not in kinds("gpt2")
    for family in KNOWN:
        config = tiny(family).config
        assert config.num_key_value_heads < config.num_attention_heads
    for family in EXPERTS:
        assert any(parameter.ndim == 3 for parameter in tiny(family).parameters())
    assert tiny("qwen2").model.layers[0].self_attn.q_proj.bias is not None
    assert tiny("qwen2").config.tie_word_embeddings
    assert not tiny("llama").config.tie_word_embeddings
    assert tiny("llama", hidden_size=32).lm_head.in_features == 32


@pytest.mark.parametrize("family", [family for family in DECODERS if family != "olmo2"])
def test_planted_outliers_change_the_activations_only(family):
    ids, plain, model = sample_ids(2, 24), tiny(family), tiny(family)
    names = plant_outliers(model, factor=30.0)
    assert any("lm_head" not in name and "embed_out" not in name for name in names)
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
    for name in names:
        size = seen[name].flatten(0, -2).abs().mean(dim=0)
        assert size[[3, 17]].min() > 8 * size.median()


def test_outliers_are_refused_where_no_norm_feeds_a_linear():
    with pytest.raises(ValueError, match="Olmo2ForCausalLM"):
        plant_outliers(tiny("olmo2"))


@pytest.mark.parametrize("family", KNOWN)
def test_planted_sink_is_massive_in_every_block(family):
    model = tiny(family)
    plant_sink(model)
    with torch.no_grad():
        states = model(input_ids=sample_ids(2, 24), output_hidden_states=True).hidden_states
    for state in states[:-1]:  # the last one is normalised
        size = state.abs().amax(dim=-1)
        assert (size[:, 0] > 10 * size[:, 1:].amax(dim=-1)).all()


def test_tokenizer_is_lossless_and_matches_the_models():
    tokenizer = tiny_tokenizer()
    text = "".join(CHARACTERS)
    ids = tokenizer(text).input_ids
    assert ids[0] == BOS
    assert max(ids) < VOCAB_SIZE
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("é").input_ids == [BOS, tokenizer.unk_token_id]
    assert tiny_tokenizer(bos=False)("a").input_ids == ids[CHARACTERS.index("a") + 1 :][:1]
    config = tiny("llama").config
    for name in ("pad", "bos", "eos"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(config, f"{name}_token_id")


def test_tokenizer_writes_chats_and_masks_the_assistant():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [token for token, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(kept) == "Yes.<|im_end|>"
    padded = tokenizer(["a", "abc"], padding=True).input_ids
    assert padded[0][0] == tokenizer.pad_token_id


def test_tokenizer_survives_the_disk(tmp_path):
    from transformers import AutoTokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("Hello, you").input_ids == tiny_tokenizer()("Hello, you").input_ids
    assert loaded.chat_template == tiny_tokenizer().chat_template


def test_unknown_family_names_the_known_ones():
    with pytest.raises(KeyError, match="llama"):
        tiny("lama")
