"""Export to compressed-tensors: read back by transformers' own quantizer with equal outputs, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_freeact import save
from optimum_freeact.cli import main
from optimum_freeact.hf.compressed_tensors import check_expressible, pack_int32
from optimum_freeact.modules.surgery import quantized_linears
from tests.helpers.quantized import logits, quantized
from tests.helpers.tiny_models import tiny_tokenizer


EXACT = {
    "weights, per channel": {"activation_bits": 16},
    "weights, groups, second order": {"activation_bits": 16, "weight_group_size": 16, "rounding": "gptq", "weight_clip": "search"},
    "8 bits": {"weight_bits": 8, "activation_bits": 8},
    "4 bits and 8": {"activation_bits": 8},
    "4 bits": {"activation_bits": 4},
    "8 bits of weights alone": {"weight_bits": 8, "activation_bits": 16},
}  # fmt: skip


def exported(tmp_path, family="llama", options=(), **changes):
    model = quantized(family, preset="rtn", **changes)
    save(model, tmp_path / "ours", tiny_tokenizer())
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--quiet", *options]) == 0
    return model, tmp_path / "theirs"


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # with output biases and tied embeddings
@pytest.mark.parametrize("kind", EXACT)
def test_transformers_own_quantizer_gives_equal_outputs(tmp_path, family, kind):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model, folder = exported(tmp_path, family, **EXACT[kind])
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    assert type(again.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    theirs = logits(again)  # the first forward unpacks
    if EXACT[kind]["activation_bits"] == 16:  # else a last bit decides a rounding further on
        assert torch.allclose(logits(model), theirs, rtol=1e-5, atol=1e-5)
    for name, linear in quantized_linears(model).items():  # every layer, on an input of its own
        x = torch.randn(3, 5, linear.in_features)
        with torch.no_grad():
            assert torch.allclose(linear(x), again.get_submodule(name)(x), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("activation_bits", [4, 8])
def test_packed_codes_beside_activations_are_what_vllm_asks_for(tmp_path, activation_bits, group):
    """The conditions of vLLM's `_is_wNaM_int`, and codes and scales that are ours bit for bit."""
    changes = {"activation_bits": activation_bits, "weight_group_size": group}
    model, folder = exported(tmp_path, options=["--layout", "packed"], **changes)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    scheme = config["config_groups"]["group_0"]
    weights, activations = scheme["weights"], scheme["input_activations"]
    assert (weights["type"], weights["dynamic"], weights["symmetric"]) == ("int", False, True)
    assert weights["strategy"] == ("channel" if group is None else "group")
    assert (activations["type"], activations["dynamic"], activations["symmetric"]) == ("int", True, True)
    assert (activations["strategy"], activations["num_bits"]) == ("token", activation_bits)
    found = load_file(folder / "model.safetensors")
    for name, linear in quantized_linears(model).items():
        assert torch.equal(found[f"{name}.weight_packed"], pack_int32(linear.codes(), 4)), name
        assert torch.equal(found[f"{name}.weight_scale"], linear.group_steps()), name


def test_the_folder_holds_the_format(tmp_path):
    model, folder = exported(tmp_path, weight_group_size=16, activation_bits=16)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert config["ignore"] == ["lm_head"]
    found = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    linear = model.get_submodule(name)
    assert found[f"{name}.weight_packed"].shape == (linear.out_features, linear.in_features // 8)
    assert torch.equal(found[f"{name}.weight_scale"], linear.group_steps())
    assert found[f"{name}.weight_shape"].tolist() == [linear.out_features, linear.in_features]
    assert not [
        key for key in found if "_input" in key or key.endswith((".weight_bias", "qscale", "weight_group_scale"))
    ]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_words_unpack_to_the_codes(bits, columns):
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    codes = torch.randint(low, high + 1, (5, columns), dtype=torch.int8)
    codes[0], codes[1] = low, high
    words = pack_int32(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-columns * bits // 32))
    shifts = torch.arange(32 // bits) * bits
    again = ((words.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :columns] + low
    assert torch.equal(again.to(torch.int8), codes)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"preset": "freeact"},
            "activation_group_size=None, activation_symmetric=True, .*centring='none', .*low_rank=0",
        ),
        (
            {"preset": "freeact-fast"},
            "activation_clip=1.0, activation_symmetric=True, .*centring='none', .*low_rank=0",
        ),
        ({"preset": "quarot"}, "activation_clip=1.0, transform='none'"),
        ({"preset": "smoothquant"}, "channel_scale='none'"),
        ({"preset": "rtn", "activation_group_size": 16}, "activation_group_size=None"),
        ({"preset": "rtn", "kv_bits": 4}, "kv_bits=16"),
        ({"preset": "rtn", "weight_bits": 16}, "weight_bits=4 or 8"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(changes, wanted):
    model = quantized("llama", **changes)
    with pytest.raises(ValueError, match=f"cannot hold this model exactly. Quantize it with .*{wanted}"):
        check_expressible(model, model.config.quantization_config)


def test_a_model_that_is_not_ours(tmp_path, capsys):
    from tests.helpers.tiny_models import tiny

    tiny("llama").save_pretrained(tmp_path / "plain")
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "out")]) == 2
    assert "is not quantized by freeact" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
