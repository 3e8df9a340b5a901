"""What cannot work is refused with one clear error, before a model is loaded wherever it can be known."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from optimum_freeact import FreeActConfig, quantize
from optimum_freeact.hf.quantizer import check_covers
from optimum_freeact.modules.surgery import quantized_linears
from tests.helpers.quantized import logits, settings
from tests.helpers.tiny_models import VOCAB_SIZE, sample_ids, tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def unloadable(monkeypatch):
    """From here on no model is built: what is refused is refused before that."""

    def built(*_, **__):
        pytest.fail("a model was built before the error")

    monkeypatch.setattr(torch.nn.Linear, "__init__", built)


def data_errors(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"title": "a"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    ids = sample_ids(6, 24)
    return {
        "none": (None, "needs calibration data.*dataset="),
        "short file": (tmp_path / "short.txt", r"6 \* 24 = 144 tokens.*10 bytes"),
        "empty file": (str(tmp_path / "empty.txt"), "144 tokens; the data is empty"),
        "empty list": ([], "144 tokens; the data is empty"),
        "empty strings": (["", ""], "144 tokens; the data is empty"),
        "short list": (["One.", "Two."], "144 tokens"),
        "broken json": (tmp_path / "broken.jsonl", r"broken\.jsonl, line 2, is not JSON"),
        "other fields": (tmp_path / "other.jsonl", "line 1, has neither a 'text' nor a 'messages'"),
        "latin": (tmp_path / "latin.txt", r"latin\.txt is no UTF-8 text"),
        "missing file": (tmp_path / "missing.txt", r"missing\.txt' is no file here"),
        "folder": (tmp_path, "is a folder"),
        "unknown name": ("no-such-dataset-anywhere", "'no-such-dataset-anywhere' is n"),
        "numbers": ([1, 2], "must be a string or a list .*got int"),
        "number": (7, "got int"),
        "few ids": (ids[:5], "144 tokens.*has 5 rows"),
        "short ids": (ids[:, :20], "length 20; seq_len=24"),
        "flat ids": (ids.flatten(), r"shape \(n, length\), got torch.int64 of \(144,\)"),
        "float ids": (ids.float(), "got torch.float32"),
        "short tensors": (list(ids[:, :20]), r"at least seq_len=24 tokens, got \(1, 20\)"),
        "few tensors": (list(ids[:5]), "144 tokens.*has 5 rows"),
    }


@pytest.mark.parametrize("kind", [
    "none", "short file", "empty file", "empty list", "empty strings", "short list", "broken json", "other fields",
    "latin", "missing file", "folder", "unknown name", "numbers", "number", "few ids", "short ids", "flat ids", "float ids",
    "short tensors", "few tensors",
])  # fmt: skip
def test_unusable_data_before_loading(folder, tmp_path, unloadable, kind):
    data, message = data_errors(tmp_path)[kind]
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(dataset=data))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"calibration_device": "cuda:0"}, {}, "calibration_device='cuda:0' is not available"),
        ({"calibration_device": "abacus"}, {}, "calibration_device='abacus' is not available"),
        ({}, {"device_map": {"": "disk"}}, "on disk.*load with that device_map"),
        ({}, {"device_map": "cuda"}, "device_map places modules on 'cuda.*', which is not available here; use 'cpu'"),
        ({}, {"device_map": 0}, "device_map places modules on '0', which is not available"),
        ({}, {"device_map": "meta"}, "device_map places modules on 'meta', which is not available"),
        ({}, {"device_map": {"model": "cpu", "lm_head": "cuda:1"}}, "device_map places modules on 'cuda:1'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is about a machine without CUDA")
def test_unusable_places_before_loading(folder, unloadable, changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(**changes), **arguments)


@pytest.mark.parametrize("part", ["maps", "outputs"])
def test_learning_without_a_batch_to_judge_by(folder, unloadable, part):
    with pytest.raises(ValueError, match="holds out the last batch.*n_samples=6 with batch_size=6 is one batch"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings(calibration="learned", learned_part=part, batch_size=6)
        )


def test_a_file_as_resume_dir(folder, tmp_path, unloadable):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="resume_dir=.*is a file"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(resume_dir=str(tmp_path / "file")))


def refused(model, message, **changes):
    """The error comes before the first block is touched, and the model can be used and quantized afterwards."""
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, settings(**changes))
    assert not quantized_linears(model)
    assert torch.equal(logits(model), before)
    assert not getattr(model, "is_quantized", False)
    return model


def test_a_group_size_that_does_not_divide_names_the_module_and_the_sizes_that_do():
    message = (
        r"weight_group_size=48 does not divide in_features=64 of 'model.layers.0.self_attn.q_proj'; use one of "
        r"\[16, 32, 64\]"
    )
    model = refused(tiny("llama"), message, weight_group_size=48)
    message = message.replace("weight_group", "activation_group")
    quantize(refused(model, message, activation_group_size=48), settings(weight_group_size=32))


def test_a_device_map_that_leaves_out_a_part_is_refused_before_calibration():
    model, places = tiny("llama"), {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": 0}
    with pytest.raises(ValueError, match=r"no device for 2 tensors of LlamaForCausalLM.*'model.norm.weight'.*or ''"):
        check_covers(model, places)
    check_covers(model, {**places, "model.norm": 0, "lm_head": 0})
    check_covers(model, {**places, "": 0})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named_before_calibration(name, value):
    """Those too that are not quantized, and those of modules left out: a checkpoint with them could not be loaded."""
    model = tiny("llama", attention_bias=True)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    for excluded in (None, ["layers.1.mlp"]):
        with pytest.raises(ValueError, match=f"The weight '{name}' holds NaN or inf: repair"):
            quantize(model, settings(modules_to_not_convert=excluded))
        assert not quantized_linears(model)


def test_activations_that_are_not_finite_name_the_module():
    model = tiny("llama")
    with torch.no_grad():  # squares of it are beyond float32
        model.model.layers[1].post_attention_layernorm.weight[3] = 1e38
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.gate_proj' holds NaN or inf in calibration"):
        quantize(model, settings())


@pytest.mark.parametrize(
    ("family", "message"),
    [("gpt2", "GPT2LMHeadModel holds no list of decoder blocks with nn.Linear")],
)
def test_models_without_linears(family, message):
    refused(tiny(family), message)


def test_models_of_another_kind():
    t5 = transformers.T5Config(vocab_size=104, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model.*decoder-only"):
        quantize(transformers.T5ForConditionalGeneration(t5), settings())
    with pytest.raises(ValueError, match="21 weights of LlamaForCausalLM are on the meta device or offloaded.*'cpu'"):
        quantize(tiny("llama").to("meta"), settings())
    with pytest.raises(ValueError, match="Linear is no model of transformers"):
        quantize(torch.nn.Linear(4, 4), settings())


def test_everything_excluded():
    refused(
        tiny("llama"), r"No linear to quantize.*modules_to_not_convert=\['layers'\]", modules_to_not_convert=["layers"]
    )


def test_ids_outside_the_vocabulary():
    ids = sample_ids(6, 24)
    ids[2, 3] = VOCAB_SIZE
    refused(tiny("llama"), rf"\[0, {VOCAB_SIZE}\), got .*{VOCAB_SIZE}", dataset=ids)


def test_text_without_a_tokenizer():
    refused(tiny("llama"), "needs a tokenizer.*tokenizer=", dataset=["some text " * 50])


def test_text_that_is_long_in_bytes_but_short_in_tokens():
    with pytest.raises(ValueError, match=r"144 tokens; the data has 100\."):
        quantize(tiny("llama"), settings(dataset=["é" * 100], tokenizer=tiny_tokenizer()))


def test_unknown_arguments_and_presets_at_once():
    with pytest.raises(TypeError, match="weights"):
        FreeActConfig(weights=4)
    with pytest.raises(
        ValueError, match="'freeact', 'freeact-fast', 'freeact-fastest', 'freeact-paper'.*'quarot'.*got 'best'"
    ):
        FreeActConfig("best")
