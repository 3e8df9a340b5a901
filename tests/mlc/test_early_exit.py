"""Stopping early must change nothing but the time."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.mlc.conftest import tiny_llama
from trl_mlc.early_exit import check_layer, decoder_of, encode_prompts, hidden_state_at
from trl_mlc.pooling import last_token_pool


SMALL = {
    "llama": {},
    "qwen2": {},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
}


def small(model_type):
    torch.manual_seed(0)
    common = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        model_type, **(SMALL[model_type] if model_type == "gpt2" else common | SMALL[model_type])
    )
    return AutoModelForCausalLM.from_config(config).eval()


def batch():
    ids = torch.randint(5, 90, (5, 9))
    mask = torch.zeros_like(ids)
    for i, n in enumerate((9, 4, 7, 2, 4)):
        mask[i, :n] = 1
    return ids, mask


@pytest.mark.parametrize("model_type", list(SMALL))
def test_equals_the_full_forward_at_every_layer(model_type):
    model = small(model_type)
    ids, mask = batch()
    decoder = decoder_of(model)
    full = decoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(full) == 5
    for layer, expected in enumerate(full):
        assert torch.equal(hidden_state_at(decoder, ids, mask, layer), expected), layer
    again = decoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(full, again, strict=True)), "the decoder was left changed"


def test_later_layers_neither_run_nor_get_gradients(tokenizer):
    model = tiny_llama(tokenizer)
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    hidden_state_at(decoder_of(model), *batch(), 2).sum().backward()
    assert ran == [0, 1]
    assert model.model.layers[1].mlp.down_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[2].mlp.down_proj.weight.grad is None


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_buckets_and_padding_do_not_matter(tokenizer, pooling):
    decoder = decoder_of(tiny_llama(tokenizer))
    ids, mask = batch()
    one = encode_prompts(decoder, ids, mask, 3, pooling)
    for buckets in (2, 3, 9):
        assert torch.allclose(encode_prompts(decoder, ids, mask, 3, pooling, buckets), one, atol=1e-5)
    alone = torch.cat(
        [
            encode_prompts(decoder, ids[i : i + 1, :n], mask[i : i + 1, :n], 3, pooling)
            for i, n in enumerate((9, 4, 7, 2, 4))
        ]
    )
    assert torch.allclose(alone, one, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradient(tokenizer):
    ids, mask = batch()

    def gradient(checkpointing):
        model = tiny_llama(tokenizer).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        pooled = last_token_pool(hidden_state_at(decoder_of(model), ids, mask, 3), mask)
        pooled.square().sum().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize(("given", "index"), [(0, 0), (4, 4), (-1, 4), (-5, 0)])
def test_layers_count_from_both_ends(tokenizer, given, index):
    assert check_layer(given, decoder_of(tiny_llama(tokenizer))) == index


def test_what_cannot_be_stopped_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"mlc_layer=5 .* 0 \(embeddings\) to 4"):
        check_layer(5, decoder_of(tiny_llama(tokenizer)))
    t5 = AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=20)
    from transformers import T5ForConditionalGeneration

    with pytest.raises(ValueError, match="encoder-decoder"):
        decoder_of(T5ForConditionalGeneration(t5))
