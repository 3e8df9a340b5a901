"""Multimodal models: their placeholders are types without anyone saying so, in every forward that a user makes."""

import pytest
import torch
from transformers import AutoConfig

from optimum_freeact.api import quantize
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.layout import find_blocks
from optimum_freeact.modules.surgery import quantized_linears
from optimum_freeact.report.inspection import inspect_model
from optimum_freeact.token_types import TokenTyper
from optimum_freeact.type_rules import COLUMN_VALUES, resolve
from optimum_freeact.type_state import given_types
from tests.helpers.quantized import distance
from tests.helpers.tiny_multimodal import AUDIO, IMAGE, MULTIMODAL, VIDEO, tiny_multimodal


def settings(inputs, **changes):
    return FreeActConfig(**{"dataset": [inputs, inputs], "n_samples": 2, "progress": False, **changes})


@torch.no_grad()
def forward(model, inputs):
    return model(**inputs).logits


def types(model):
    return model._freeact_state.types


@pytest.fixture(scope="module", params=MULTIMODAL)
def family(request):
    """Name, quantized model, inputs and full-precision logits."""
    model, inputs = tiny_multimodal(request.param)
    expected = forward(model, inputs)
    return request.param, quantize(model, settings(inputs, kv_bits=4)), inputs, expected


def wanted(model, inputs):
    names = model.hf_quantizer.quantization_config.token_types
    ids = inputs["input_ids"]
    found = torch.zeros_like(ids)
    for name, token in (("image", IMAGE), ("audio", AUDIO)):
        found[ids == token] = names.index(name) if name in names else 0
    found[:, 0] = names.index("sink")
    return found


def test_placeholders_are_typed_and_the_model_still_computes_its_function(family):
    name, model, inputs, expected = family
    got = forward(model, inputs)
    assert torch.equal(types(model), wanted(model, inputs))
    assert len(types(model).unique()) == 3
    assert distance(got, expected) < 0.35
    assert all(key.startswith(find_blocks(model)[0]) for key in quantized_linears(model))  # towers are left alone
    assert name.split("_")[0] in type(model).__name__.lower()


@pytest.mark.parametrize(("family", "column"), [("qwen3_vl", "mm_token_type_ids"), ("gemma3", "token_type_ids")])
def test_what_a_processor_says_counts_beside_ids_and_without_them(family, column):
    """Values 1, 2, 3 are image, video, audio; a model without one of them has no such type."""
    model, inputs = tiny_multimodal(family)
    names, rules = resolve(model, ["text", "sink", "auto"], None, None)
    typer, ids = TokenTyper(names, rules), inputs["input_ids"]
    kinds = {value: names.index(name) for name, value in COLUMN_VALUES.items() if name in names}
    assert ("video" in names) == (family == "qwen3_vl")
    told = torch.zeros_like(ids)
    told[:, 8] = 2
    told[:, 9] = 1
    told[:, 0] = 1  # a picture may come first: its token is the sink all the same
    expected = torch.zeros_like(ids)
    expected[:, 8], expected[:, 9], expected[:, 0] = kinds.get(2, 0), kinds[1], names.index("sink")
    embeddings = torch.zeros(*ids.shape, 64)
    assert torch.equal(typer({"inputs_embeds": embeddings, column: told}), expected)
    expected[ids == IMAGE] = kinds[1]
    assert torch.equal(typer({"input_ids": ids, column: told}), expected)
    if "video" in names:
        assert torch.equal(typer({"input_ids": ids.masked_fill(ids == IMAGE, VIDEO)}) == kinds[2], ids == IMAGE)


def test_generated_tokens_are_text(family):
    _, model, inputs, _ = family
    made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] == inputs["input_ids"].shape[1] + 3
    assert types(model).tolist() == [[0], [0]]


def test_saved_and_loaded_again(family, tmp_path):
    _, model, inputs, _ = family
    expected = forward(model, inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(forward(again, inputs), expected)
    assert torch.equal(types(again), types(model))
    found = inspect_model(AutoConfig.from_pretrained(tmp_path), tmp_path, torch.device("cpu"))
    assert found.quantized
    assert found.size.n_linears == len(quantized_linears(model))


def test_left_padding_moves_types_and_sink():
    model, inputs = tiny_multimodal("llava")
    model = quantize(model, settings(inputs))
    forward(model, inputs)
    alone = types(model).clone()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded = {
        **inputs,
        "input_ids": torch.cat((torch.zeros(2, 3, dtype=ids.dtype), ids), 1),
        "attention_mask": torch.cat((torch.zeros(2, 3, dtype=mask.dtype), mask), 1),
    }
    forward(model, padded)
    assert torch.equal(types(model)[:, 3:], alone)
    assert not types(model)[:, :3].any()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_packed_sequences_get_what_they_get_alone(name):
    """Two texts in one row, with the four rows of positions that these models take them by."""
    model, inputs = tiny_multimodal(name)
    model = quantize(model, settings(inputs))
    ids = torch.arange(6, 18)[None]
    positions = torch.tensor([*range(5), *range(7)]).expand(4, 1, 12)
    got = forward(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
    assert types(model).tolist() == [[1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]
    for part, told in zip(ids.split([5, 7], 1), got.split([5, 7], 1), strict=True):
        alone = forward(model, {"input_ids": part, "use_cache": False})
        torch.testing.assert_close(told, alone, rtol=1e-4, atol=1e-4)


def test_padding_takes_no_part_in_calibration():
    """The same samples with padding of any content give the same model."""
    model, inputs = tiny_multimodal("llava")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    results = []
    for filler in (0, 50):
        padded = {
            **inputs,
            "input_ids": torch.cat((ids, torch.full((2, 3), filler)), 1),
            "attention_mask": torch.cat((mask, torch.zeros(2, 3, dtype=mask.dtype)), 1),
        }
        fresh, _ = tiny_multimodal("llava")
        results.append(forward(quantize(fresh, settings(padded)), inputs))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_a_text_only_forward_has_no_image_types():
    model, inputs = tiny_multimodal("internvl")
    model = quantize(model, settings(inputs))
    text = inputs["input_ids"][:, 7:]
    forward(model, {"input_ids": text})
    assert types(model).tolist() == [[1] + [0] * (text.shape[1] - 1)] * 2


def test_embeddings_without_ids_ask_for_types_and_take_them():
    model, inputs = tiny_multimodal("llava")
    model = quantize(model, settings(inputs))
    text = inputs["input_ids"][:, 7:]
    expected = forward(model, {"input_ids": text})
    embedded = {"inputs_embeds": model.get_input_embeddings()(text)}
    with pytest.raises(ValueError, match=r"\['image'\].*given_types"):
        forward(model, embedded)
    with given_types(model, torch.zeros_like(text)):
        assert torch.equal(forward(model, embedded), expected)
    with pytest.raises(ValueError, match=r"given_types"):
        forward(model, embedded)
    for wrong in (torch.zeros(2, 3, dtype=torch.long), torch.full_like(text, 3), torch.zeros(text.shape)):
        with given_types(model, wrong), pytest.raises(ValueError, match="Token types must"):
            forward(model, embedded)


def test_types_of_one_forward_do_not_reach_the_next():
    """A forward that fails between the outer model and its decoder leaves nothing behind for others."""
    model, inputs = tiny_multimodal("llava")
    model = quantize(model, settings(inputs))
    with pytest.raises(ValueError):
        forward(model, {**inputs, "pixel_values": inputs["pixel_values"][:1]})  # one picture too few
    ids = inputs["input_ids"][:, 7:]
    forward(model, {"input_ids": ids})
    assert types(model).tolist() == [[1] + [0] * (ids.shape[1] - 1)] * 2


def test_every_part_of_the_inputs_reaches_calibration():
    """Calibrated on pictures, a model differs from one calibrated on the same ids with other pictures."""
    results = []
    for factor in (1.0, 3.0):
        model, inputs = tiny_multimodal("llava")
        data = {**inputs, "pixel_values": inputs["pixel_values"] * factor}
        results.append(forward(quantize(model, settings(data)), inputs))
    assert not torch.allclose(results[0], results[1], atol=1e-3)


BAD_DATA = [
    ([{"input_ids": torch.zeros(1, 4)}], 1, "input_ids of a calibration input must be integers"),
    ([{"input_ids": torch.zeros(1, 0, dtype=torch.long)}], 1, "input_ids of a calibration input"),
    ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], 2, "n_samples=2 inputs, got 1"),
    ([{"input_ids": torch.full((1, 4), 500)}], 1, r"must lie in \[0, 120\), got 500"),
]


@pytest.mark.parametrize(("data", "n_samples", "message"), BAD_DATA)
def test_wrong_prepared_inputs_are_named(data, n_samples, message):
    model, _ = tiny_multimodal("llava")
    with pytest.raises(ValueError, match=message):
        quantize(model, FreeActConfig(dataset=data, n_samples=n_samples, progress=False))


def test_sequences_without_a_batch_dimension_get_one():
    model, inputs = tiny_multimodal("llava")
    items = [
        {
            "input_ids": inputs["input_ids"][i],
            "attention_mask": inputs["attention_mask"][i],
            "pixel_values": inputs["pixel_values"][i : i + 1],
        }
        for i in range(2)
    ]
    model = quantize(model, FreeActConfig(dataset=items, n_samples=2, progress=False))
    assert model.hf_quantizer.quantization_config.calibration_record["n_samples"] == 2
