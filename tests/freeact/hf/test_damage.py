"""Checkpoints that are incomplete, damaged, foreign or from the future: one clear error, never a wrong model."""

import json
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from optimum_freeact import FreeActConfig, quantize
from tests.helpers.quantized import logits, quantized, reload, settings
from tests.helpers.tiny_models import tiny


@pytest.fixture(scope="module")
def model():
    return quantized("llama", {"num_hidden_layers": 1})


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(folder):
    return folder / "model.safetensors"


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file(folder, keep):
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors' \(\d+ bytes\) is truncated or damaged.*save it again"):
        reload(folder)


def test_a_file_with_more_than_it_announces(folder):
    weights(folder).write_bytes(weights(folder).read_bytes() + b"more")
    with pytest.raises(ValueError, match="truncated or damaged"):
        reload(folder)


def test_a_truncated_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=shard.name):
        reload(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "is truncated or damaged .JSONDecodeError"),
        (lambda text: text.replace("weight_map", "weight_nap"), "is truncated or damaged .KeyError"),
        (lambda text: text.replace("-00001-of", "-90001-of"), "names .*90001-of.*which are not there"),
    ],
    ids=["cut", "key", "file"],
)
@pytest.mark.parametrize("quantize_it", [False, True], ids=["saved", "to be quantized"])
def test_a_damaged_index_of_shards_is_named(model, tmp_path, damage, said, quantize_it):
    (tiny("llama") if quantize_it else model).save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json' {said}"):
        reload(tmp_path, **({"quantization_config": settings()} if quantize_it else {}))


def test_an_index_that_is_not_used_may_be_damaged(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    reload(folder)


def test_a_flipped_bit_anywhere_in_the_header_is_an_error_or_harmless(folder, model):
    """Names, types, shapes, offsets, lengths: whatever the bit hits, nobody gets a model with other logits."""
    path, expected = weights(folder), logits(model)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    chosen, kinds = random.Random(0), {}
    for position in [*range(8), *chosen.sample(range(8, 8 + length), 60)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        try:
            again = reload(folder)
        except (ValueError, OSError, RuntimeError) as error:
            kind = type(error).__name__
        else:
            kind = "harmless" if torch.equal(logits(again), expected) else f"wrong logits at {position}"
        kinds[kind] = kinds.get(kind, 0) + 1
    assert set(kinds) <= {"ValueError", "OSError", "RuntimeError", "harmless"}
    assert kinds["ValueError"] > 50
    assert kinds.get("harmless", 0) < 10


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.gate_proj_input.clip",
        "model.layers.0.self_attn.o_proj.type_bias",
    ],
)
def test_a_missing_tensor_is_named(folder, name):
    tensors = load_file(weights(folder))
    del tensors[name]
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors.*{name}"):
        reload(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.qscale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_with_nan_is_named(folder, name, value):
    tensors = load_file(weights(folder))
    tensors[name].view(-1)[3] = value
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}.*NaN or inf"):
        reload(folder)


def test_a_pickle_is_refused(folder):
    tensors = load_file(weights(folder))
    weights(folder).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin' is not a safetensors file.*never pickled"):
        reload(folder)


def test_a_newer_format_is_refused_before_anything_is_read(folder):
    edit_config(folder, format_version=99, transform="wavelets", unheard_of=True)
    weights(folder).unlink()
    with pytest.raises(ValueError, match="format version 99.*newer hf-concord"):
        reload(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_groups": None}, "lacks 'input_groups'"),
        ({"weight_bits": 5}, "weight_bits must be one of"),
        ({"weight_bit": 4}, "does not know"),
    ],
)
def test_a_config_that_is_not_ours(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises((ValueError, TypeError), match=message):
        reload(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_bits": 8},
        {"centring": "none"},
        {"weight_group_size": 16},
        {"low_rank": 3},
        {"low_rank": 0},
        {"transform": "none"},
    ],
)
def test_a_config_that_does_not_fit_the_tensors(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises((ValueError, RuntimeError), match="mismatch|lacks|UNEXPECTED|do not belong"):
        reload(folder)


# --- already quantized --------------------------------------------------------------------------------------------------


def test_quantizing_a_quantized_checkpoint(folder):
    with pytest.raises(ValueError, match="quantized already.*full-precision model again"):
        reload(folder, quantization_config=settings())


def test_quantizing_a_quantized_model_in_memory(model, folder):
    for each in (model, reload(folder)):
        with pytest.raises(ValueError, match=r"quantized already \(FreeActConfig\).*full precision"):
            quantize(each, settings())


def test_another_methods_config_on_our_checkpoint(folder):
    with pytest.raises(ValueError, match="FreeActConfig.*BitsAndBytesConfig"):
        reload(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_our_config_on_another_methods_checkpoint(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="BitsAndBytesConfig.*FreeActConfig"):
        reload(tmp_path, quantization_config=settings())


def test_another_methods_model_in_memory():
    model = tiny("llama")
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"quantized already \(BitsAndBytesConfig\)"):
        quantize(model, settings())


def test_no_code_of_a_checkpoint_is_ever_trusted(folder):
    """Neither written nor needed: the folder holds data, and loads with remote code forbidden."""
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert "auto_map" not in (folder / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_folder_without_weights(folder):
    weights(folder).unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        reload(folder)
    shutil.rmtree(folder)
    assert FreeActConfig().quant_method == "freeact"
