"""Quantized models made plain again."""

import json

import pytest
import torch
from torch import nn

from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.runtime import plain_weight
from tests.helpers.quantized import distance, logits, quantized, reload
from tests.helpers.tiny_models import sample_ids, tiny


@pytest.mark.parametrize(("family", "share"), [("llama", 0.35), ("qwen2", 0.35), ("opt", 1.1)])
def test_dequantized_is_near_and_plain(family, share, tmp_path):
    """At W4A16, in shares of the rounding error; a plain bias for text alone gives 0.44, 0.59 and 2.16."""
    plain, model = tiny(family), quantized(family, activation_bits=16)
    quantized_logits = logits(model)
    model.save_pretrained(tmp_path / "quantized")  # leaves config.dtype a string
    model.dequantize()
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not any(isinstance(m, FreeActInput) for m in model.modules())
    dense = logits(model)
    assert distance(dense, quantized_logits) < share * distance(quantized_logits, logits(plain))
    biases = {name for name, _ in plain.named_parameters() if name.endswith("bias")}
    assert {name for name, _ in model.named_parameters() if name.endswith("bias")} == biases
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = reload(tmp_path / "plain")
    assert type(again) is type(plain)
    assert torch.equal(logits(again), dense)


def test_dequantized_is_near_though_a_type_was_never_seen():
    """Its mean is that of all tokens, in the span of the others': what it answers differs from theirs by rounding alone."""
    unseen = {"token_types": ["text", "sink", "rare", "often"], "type_rules": {"rare": [96], "often": list(range(30))}}
    ids = sample_ids(6, 24, seed=7).clamp(max=95)
    model = quantized("llama", dataset=ids, **unseen)
    linears = [m for m in model.modules() if isinstance(m, FreeActLinear)]
    assert len(linears) == 14
    for linear in linears:
        rounded, _ = linear.dequantized()
        assert distance(plain_weight(linear)[0], rounded) < 0.05


def test_dequantized_takes_the_models_dtype(folder):
    model = reload(folder, dtype=torch.bfloat16)
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.dequantize is not None
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16", torch.float32, torch.bfloat16])
def test_dequantized_into_another_dtype_runs(folder, expected, loaded, dtype):
    """The rest of the model comes along: linears of one type and norms of another would not run."""
    model = reload(folder, dtype=loaded)
    model.dequantize(dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."))
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model).dtype == wanted
    assert distance(logits(model), expected) < 0.6


@pytest.mark.parametrize("dtype", ["bfloat17", "int8", "nn"])
def test_dequantized_into_no_dtype(folder, dtype):
    model = reload(folder)
    before = logits(model)
    with pytest.raises(ValueError, match=f"floating-point type such as 'float32'.*got '{dtype}'"):
        model.dequantize(dtype)
    assert torch.equal(logits(model), before)


def test_without_rounding_dequantized_is_exact():
    exact = quantized("qwen2", weight_bits=16, activation_bits=16)
    exact.dequantize()
    assert distance(logits(exact), logits(tiny("qwen2"))) < 1e-5
