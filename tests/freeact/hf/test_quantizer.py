"""Through from_pretrained and save_pretrained: every way to quantize, save and load."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from optimum_freeact import FreeActConfig, quantize
from optimum_freeact.modules.surgery import quantized_linears
from tests.helpers.quantized import distance, logits, own_tensors, quantized, reload, settings
from tests.helpers.tiny_models import sample_ids, tiny


def test_quantizing_while_loading(model, expected, plain_folder):
    assert len(quantized_linears(model)) == 14
    assert not any(parameter.requires_grad for m in quantized_linears(model).values() for parameter in m.parameters())
    assert not model.training
    assert 0.01 < distance(expected, logits(reload(plain_folder))) < 0.6
    record = model.config.quantization_config.calibration_record
    assert len(record["output_error"]) == 2


def test_the_callers_config_stays_as_it_was(plain_folder, tmp_path):
    """One config may quantize several models: what is recorded of one must not reach another."""
    config = settings()
    before = config.to_dict()
    first = quantize(tiny("llama"), config)
    shared = first.config.quantization_config.to_dict()
    quantize(tiny("opt"), config)
    reload(plain_folder, quantization_config=config)
    assert config.to_dict() == before
    assert config.dataset is not None
    assert first.config.quantization_config.to_dict() == shared
    first.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(first))


def test_reload_is_bit_equal(folder, expected):
    assert torch.equal(logits(reload(folder)), expected)


def test_saving_again_writes_the_same_bytes(folder, tmp_path):
    reload(folder).save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_on_disk(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "freeact"
    assert not {"dataset", "tokenizer", "auto_map"} & {*config, *config["quantization_config"]}
    tensors = load_file(folder / "model.safetensors")
    packed = tensors["model.layers.0.mlp.up_proj.weight"]
    assert packed.dtype == torch.uint8
    assert packed.shape == (96, 2, 16)  # groups of 32
    assert not any("lm_head" in name for name in tensors)  # tied


def test_loading_never_makes_a_full_precision_weight(folder, monkeypatch):
    """Every nn.Linear that is built stays on the meta device, and no quantized module ever holds a float weight."""
    made = []
    original = nn.Linear.__init__

    def watched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append((self.weight.device.type, tuple(self.weight.shape)))

    monkeypatch.setattr(nn.Linear, "__init__", watched)
    model = reload(folder)
    assert len(made) == 15
    assert {device for device, _ in made} == {"meta"}
    for module in quantized_linears(model).values():
        assert module.weight.dtype == torch.uint8
        assert not any(parameter.is_floating_point() for parameter in module.parameters())
        widest = max(buffer.numel() for buffer in module.buffers() if buffer.is_floating_point())
        assert widest < module.in_features * module.out_features / 8


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["20KB", "50GB"])
def test_shards_and_ties(tied, size, tmp_path):
    model = quantized("llama", {"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path, max_shard_size=size)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards > 2 if size == "20KB" else shards == 1
    again = reload(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_of_the_rest_leave_ours_alone(folder, model, expected, dtype):
    again = reload(folder, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    assert again.dtype == wanted
    assert again.lm_head.weight.dtype == wanted
    ours = own_tensors(model)
    for name, tensor in own_tensors(again).items():
        assert torch.equal(tensor, ours[name]), name
        assert tensor.dtype == ours[name].dtype, name
    assert distance(logits(again), expected) < (1e-6 if wanted == torch.float32 else 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_reload_bit_equal(dtype, plain_folder, tmp_path):
    model = reload(plain_folder, dtype=dtype, quantization_config=settings(kv_bits=4))
    assert {t.dtype for n, t in own_tensors(model).items() if n.endswith(("qscale", "type_bias", "clip"))} == {
        torch.float32
    }
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))


OFFLOADED = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
OFFLOADED |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}, OFFLOADED], ids=str)
def test_device_maps(folder, expected, place, tmp_path):
    again = reload(folder, device_map=place, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(again), expected)
    if place is OFFLOADED:
        assert again.model.layers[1].mlp.up_proj.weight.device.type == "meta"
        with pytest.raises(ValueError, match="model.layers.1.*offloaded"):
            again.dequantize()
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(reload(tmp_path / "again")), expected)


@pytest.mark.parametrize("fine", [False, True])
def test_device_maps_of_the_plain_model_serve_what_quantizing_added(fine, tmp_path):
    """A map that names blocks, or single linears, knows neither their inputs nor the cache's means."""
    model = quantized("qwen2", kv_bits=4)
    model.save_pretrained(tmp_path)
    place = dict(OFFLOADED)
    if fine:
        del place["model.layers.1"]
        place |= {f"model.layers.1.self_attn.{name}_proj": "cpu" for name in "qkvo"}
        place |= dict.fromkeys(("model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"), "cpu")
        place["model.layers.1.mlp"] = "disk"
    before = dict(place)
    again = reload(tmp_path, device_map=place, offload_folder=tmp_path / "offload")
    assert place == before
    assert torch.equal(logits(again, use_cache=True), logits(model, use_cache=True))


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_quantizing_into_a_device_map(plain_folder, expected, place):
    assert torch.equal(logits(reload(plain_folder, device_map=place, quantization_config=settings())), expected)


def test_base_model_and_other_heads(folder, model):
    ids = sample_ids(2, 12, seed=5)
    base = AutoModel.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3
    )  # its head is new, and may be
    assert classifier(input_ids=ids).logits.shape == (2, 3)


def test_a_base_model_serves_the_whole(plain_folder, expected, tmp_path):
    AutoModel.from_pretrained(
        plain_folder, quantization_config=settings(), attn_implementation="eager"
    ).save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), expected)  # the head is tied to the embeddings


def test_kv_bits_may_be_chosen_anew_and_nothing_else(folder, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers announces the override
        again = reload(folder, quantization_config=FreeActConfig(kv_bits=4))
        assert again.config.quantization_config.kv_bits == 4
        assert not torch.equal(logits(again, use_cache=True), expected)
        for other in ({"weight_bits": 8}, {"dataset": ["x"]}, {"preset": "rtn"}):
            with pytest.raises(
                ValueError, match=f"quantized already.*{next(iter(other))}.*without quantization_config"
            ):
                reload(folder, quantization_config=FreeActConfig(**other))
        same = reload(folder, quantization_config=reload(folder).config.quantization_config)
        assert torch.equal(logits(same), expected)


def test_a_cache_is_rotated_as_was_recorded(folder, tmp_path):
    """About its means too; a checkpoint that records nothing loads as releases of its time did."""
    model = quantized("qwen2", kv_bits=4)
    assert model.config.quantization_config.kv_rotation is True
    assert quantized("qwen2", transform="none", kv_bits=4).config.quantization_config.kv_rotation is False
    model.save_pretrained(tmp_path)

    def spec(**options):
        with torch.no_grad():
            layer = reload(tmp_path, **options)(input_ids=sample_ids(1, 5), use_cache=True).past_key_values.layers[0]
        return layer.spec

    assert spec().rotate
    assert spec().key_mean[0].any()
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["quantization_config"]["kv_rotation"]
    path.write_text(json.dumps(stored))
    assert not spec().rotate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers announces the override
        assert spec(quantization_config=FreeActConfig(kv_rotation=True)).rotate
        without_means = reload(folder, quantization_config=FreeActConfig(kv_bits=4, kv_rotation=False))
        assert not without_means(input_ids=sample_ids(1, 5), use_cache=True).past_key_values.layers[0].spec.rotate
