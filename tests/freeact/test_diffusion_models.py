"""LLaDA and Dream without remote code, their layouts recognised by structure, and text from them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from optimum_freeact.api import quantize
from optimum_freeact.calibration.masking import mask_samples
from optimum_freeact.models.denoise import denoise, fill, predictions
from optimum_freeact.models.dream import DreamForMaskedLM
from tests.helpers.quantized import distance, logits, settings
from tests.helpers.tiny_diffusion import KINDS, MASK, make
from tests.helpers.tiny_models import randomize_, sample_ids, tiny


def masked_ids():
    ids = sample_ids(2, 12, seed=5)
    ids[:, 4:9] = MASK
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_token_sees_every_real_token_and_no_padding(kind, attention):
    model = make(kind)
    model.set_attn_implementation(attention)
    ids = sample_ids(2, 8)
    changed = ids.clone()
    changed[:, -1] = 50
    assert not torch.allclose(logits(model, ids)[:, 0], logits(model, changed)[:, 0], atol=1e-3)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    hidden = [logits(model, x, attention_mask=mask)[:, :-1] for x in (ids, changed)]
    torch.testing.assert_close(hidden[0], hidden[1])
    torch.testing.assert_close(hidden[0], logits(model, ids[:, :-1]), rtol=1e-4, atol=1e-4)


def test_it_is_a_llama_without_its_causal_mask():
    """A bidirectional model under a triangular 4-D mask is the Llama with the same weights."""
    plain, model = tiny("llama"), make(rms_norm_eps=1e-6)
    model.load_state_dict(plain.state_dict())
    ids = sample_ids(2, 8)
    causal = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 8, 8)
    torch.testing.assert_close(logits(model, ids, attention_mask=causal), logits(plain, ids), rtol=1e-4, atol=1e-4)


ORIGINAL = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
    **{
        f"model.transformer.blocks.{i}.{theirs}.weight": f"model.layers.{i}.{ours}.weight"
        for i in range(2)
        for theirs, ours in {
            "attn_norm": "input_layernorm",
            "ff_norm": "post_attention_layernorm",
            "q_proj": "self_attn.q_proj",
            "k_proj": "self_attn.k_proj",
            "v_proj": "self_attn.v_proj",
            "attn_out": "self_attn.o_proj",
            "ff_proj": "mlp.gate_proj",
            "up_proj": "mlp.up_proj",
            "ff_out": "mlp.down_proj",
        }.items()
    },
}


def original_checkpoint(model, folder):
    """A checkpoint as LLaDA's own code writes it, remote code and all."""
    state = model.state_dict()
    assert set(ORIGINAL.values()) == set(state)
    save_file(
        {theirs: state[ours].contiguous() for theirs, ours in ORIGINAL.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "model_type": "llada",
        "d_model": 64,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "mlp_hidden_size": 96,
        "embedding_size": 104,
        "vocab_size": 104,
        "max_sequence_length": 128,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "weight_tying": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "mask_token_id": MASK,
        "activation_type": "silu",
        "block_type": "llama",
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_an_original_checkpoint_loads_is_quantized_and_saved_in_its_own_names(tmp_path):
    reference = make(rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    original_checkpoint(reference, source)
    model = AutoModelForMaskedLM.from_pretrained(source, attn_implementation="eager")
    ids = masked_ids()
    assert torch.equal(logits(model, ids), logits(reference, ids))
    model = quantize(model, settings())
    assert model.hf_quantizer.quantization_config.token_types == ["text", "sink", "mask"]
    assert distance(logits(model, ids), logits(reference, ids)) < 0.3
    model.save_pretrained(target)
    names = set(load_file(target / "model.safetensors"))
    assert "model.transformer.blocks.0.attn_out.weight" in names
    again = AutoModelForMaskedLM.from_pretrained(target, attn_implementation="eager")
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_dream_loads_and_is_quantized(tmp_path):
    make("dream").save_pretrained(tmp_path / "source")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "source", attn_implementation="eager")
    assert type(model) is DreamForMaskedLM
    assert model.config.shifted_logits
    ids = masked_ids()
    expected = logits(model, ids)
    model = quantize(model, settings())
    assert distance(logits(model, ids), expected) < 0.3
    model.save_pretrained(tmp_path / "target")
    assert torch.equal(
        logits(AutoModelForMaskedLM.from_pretrained(tmp_path / "target", attn_implementation="eager"), ids),
        logits(model, ids),
    )


class RemoteConfig(PreTrainedConfig):
    model_type = "remote_llada_like"


class RemoteBlock(nn.Module):
    """A block with LLaDA's names of modules: what its remote code would build."""

    def __init__(self):
        super().__init__()
        self.attn_norm, self.ff_norm = nn.LayerNorm(64), nn.LayerNorm(64)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.attn_out, self.ff_out = nn.Linear(64, 64, bias=False), nn.Linear(96, 64, bias=False)
        self.ff_proj, self.up_proj = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)

    def forward(self, x, **_):
        h = self.attn_norm(x)
        x = x + self.attn_out(
            nn.functional.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h))
        )
        h = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))


class RemoteInner(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(104, 64),
                "blocks": nn.ModuleList([RemoteBlock(), RemoteBlock()]),
                "ln_f": nn.LayerNorm(64),
            }
        )


class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = RemoteInner(), nn.Linear(64, 104, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.transformer["wte"]

    def get_decoder(self):
        return self

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.model.transformer["wte"](input_ids)
        for block in self.model.transformer["blocks"]:
            x = block(x)
        return type("Output", (), {"logits": self.lm_head(self.model.transformer["ln_f"](x))})()


def test_a_layout_that_no_table_knows_is_recognised_by_structure():
    model = RemoteModel(RemoteConfig(mask_token_id=MASK)).eval()
    randomize_(model)
    ids = masked_ids()
    expected = logits(model, ids)
    model = quantize(model, settings())
    config = model.hf_quantizer.quantization_config
    groups = [["q_proj", "k_proj", "v_proj"], ["attn_out"], ["ff_proj", "up_proj"], ["ff_out"]]
    assert config.input_groups == {"*": groups}
    assert config.token_types == ["text", "sink", "mask"]
    assert distance(logits(model, ids), expected) < 0.3


# --- calibration and text --------------------------------------------------------------------------------------------


def test_calibration_text_is_masked_at_shares_spread_over_zero_to_one():
    ids = sample_ids(8, 40)
    masked = mask_samples(ids, MASK, seed=3)
    counts = (masked == MASK).sum(1).sort().values
    assert counts.tolist() == [round((i + 0.5) / 8 * 40) for i in range(8)]
    assert torch.equal(masked[masked != MASK], ids[masked != MASK])
    assert torch.equal(masked, mask_samples(ids, MASK, seed=3))
    assert not torch.equal(masked, mask_samples(ids, MASK, seed=4))


def test_masks_reach_calibration_unless_the_data_has_its_own(caplog):
    model = quantize(make(), settings())
    means = model.model.layers[0].self_attn.q_proj.source.mean.float()
    assert "calibration token" not in caplog.text
    assert (means[2] - means[0]).norm() > 0.1 * means[0].norm()
    ids = sample_ids(6, 24, seed=7)
    ids[:, 20:] = MASK  # the user's own masking is left as it is
    own = quantize(make(), settings(dataset=ids)).model.layers[0].self_attn.q_proj.source.mean.float()
    assert not torch.allclose(own[0], means[0])


def test_shifted_logits_belong_to_the_next_token():
    told = torch.arange(12.0).view(1, 4, 3)
    assert torch.equal(predictions(told, None, False), told)
    assert torch.equal(predictions(told, None, True), told[:, [0, 0, 1, 2]])
    before = torch.full((1, 1, 3), -1.0)
    assert torch.equal(predictions(told, before, True), torch.cat((before, told[:, :3]), 1))


def test_the_surest_places_are_filled_first():
    ids = torch.tensor([[9, MASK, MASK, MASK]])
    scores = torch.zeros(1, 4, 104)
    scores[0, 1, 20], scores[0, 2, 21], scores[0, 3, 22] = 5.0, 9.0, 7.0
    scores[0, :, MASK] = 50.0  # is never chosen
    generator = torch.Generator().manual_seed(0)
    assert fill(ids, scores, MASK, 3, 0.0, generator).tolist() == [[9, MASK, 21, MASK]]
    assert fill(ids, scores, MASK, 2, 0.0, generator).tolist() == [[9, MASK, 21, 22]]
    assert fill(ids, scores, MASK, 1, 0.0, generator).tolist() == [[9, 20, 21, 22]]


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_fills_all_places_and_keeps_the_prompt(kind):
    model = quantize(make(kind), settings(kv_bits=4))
    prompt = sample_ids(2, 6)
    for arguments in ({}, {"block": 4}, {"block": 4, "use_cache": True}, {"temperature": 1.0}):
        made = denoise(model, prompt, 8, 4, **arguments)
        assert made.shape == (2, 14)
        assert torch.equal(made[:, :6], prompt)
        assert not (made == MASK).any()


@pytest.mark.parametrize("use_cache", [False, True])
def test_types_follow_tokens_from_masked_to_written_while_a_block_is_denoised(use_cache):
    """In each forward, cached or not: masked places are masks, those just written are text, and only the very first is the sink."""
    model, seen = quantize(make(), settings(kv_bits=4)), []

    def note(_module, _args, kwargs):
        seen.append((kwargs["input_ids"].clone(), model._freeact_state.types.clone()))

    model.model.register_forward_pre_hook(note, with_kwargs=True)  # after the hook that finds the types
    denoise(model, sample_ids(2, 6), 8, 4, block=4, use_cache=use_cache)
    started = False
    for ids, types in seen:
        expected = (ids == MASK).long() * 2
        if not use_cache or not started:
            expected[:, 0] = 1
        started = True
        assert torch.equal(types, expected)
    masks = [int((ids == MASK).sum()) for ids, _ in seen]
    assert masks == ([0, 8, 4, 0, 8, 4] if use_cache else [16, 12, 8, 4])


def test_placeholders_are_never_written():
    """A place for a picture stands for one that was given; one more, and the model refuses the text."""
    model, prompt = make(), sample_ids(2, 6)
    written = denoise(model, prompt, 8, 8)[:, 6:]
    model.config.image_token_id = int(written[0, 0])
    again = denoise(model, prompt, 8, 8)[:, 6:]
    assert not (again == model.config.image_token_id).any()


def test_a_cache_holds_the_finished_text_only():
    """Blocks computed through the cache see what a block-wise mask would let them see."""
    model = make()
    prompt, block = sample_ids(1, 6), 4
    ids = torch.cat((prompt, torch.full((1, block), MASK)), 1)
    mask = torch.zeros(1, 1, 10, 10)
    mask[..., :6, 6:] = torch.finfo(torch.float32).min
    scores = logits(model, ids, attention_mask=mask)[:, 6:]
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(
        denoise(model, prompt, block, 1, block=block, use_cache=True)[:, 6:],
        fill(ids[:, 6:], scores, MASK, 1, 0.0, generator),
    )


def test_denoising_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="no mask_token_id"):
        denoise(tiny("llama"), sample_ids(1, 4), 4, 4)
    for arguments in (
        {"new_tokens": 6, "steps": 2, "block": 4},
        {"new_tokens": 4, "steps": 8},
        {"new_tokens": 8, "steps": 3, "block": 4},
    ):
        with pytest.raises(ValueError, match="must be a multiple"):
            denoise(make(), sample_ids(1, 4), **arguments)
