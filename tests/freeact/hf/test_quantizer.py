"""Through from_pretrained and save_pretrained: every way to load, cast, copy, dequantize and continue."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from optimum_freeact import FreeActConfig, quantize
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.kv_layer import FreeActCacheLayer
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.runtime import plain_weight
from optimum_freeact.modules.surgery import quantized_linears
from tests.helpers.quantized import distance, logits, quantized, reload, settings
from tests.helpers.tiny_models import BOS, PAD, sample_ids, tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny("qwen2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(plain_folder):
    return reload(plain_folder, quantization_config=settings())


@pytest.fixture(scope="module")
def expected(model):
    return logits(model)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def own_tensors(model):
    """Tensors of the quantized modules."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, (FreeActLinear, FreeActInput))
        for key, tensor in module.state_dict().items()
    }


# --- quantize, save, load ----------------------------------------------------------------------------------------------


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


# --- casts, copies, pickles ---------------------------------------------------------------------------------------------


def test_casts_keep_our_dtypes(model, expected):
    cast = copy.deepcopy(model).to(torch.bfloat16)
    ours = own_tensors(model)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in own_tensors(cast).items())
    assert cast.lm_head.weight.dtype == torch.bfloat16
    assert distance(logits(cast), expected) < 0.5
    assert torch.equal(logits(cast.to(torch.float64).to(torch.float32)), logits(cast))
    inner = copy.deepcopy(model.model.layers[0].mlp).half()  # a submodule has no guard against it
    assert inner.up_proj.qscale.dtype == torch.float32
    with pytest.raises(ValueError, match="half"):
        model.half()


def test_copies_are_whole_and_independent(model, expected):
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), expected)
    with torch.no_grad():
        for module in quantized_linears(clone).values():
            module.weight.zero_()
            module.prepare()
    assert not torch.equal(logits(clone), expected)
    assert torch.equal(logits(model), expected)
    layer = clone.model.layers[0].self_attn
    assert layer.q_proj.source is layer.k_proj.source is layer.q_proj_input
    assert layer.q_proj_input is not model.model.layers[0].self_attn.q_proj_input


@pytest.mark.parametrize(
    "dump", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "torch"]
)
def test_pickling_is_refused_with_the_way_out(model, dump):
    with pytest.raises(TypeError, match=r"not pickled.*save_pretrained\(folder\).*from_pretrained\(folder\)"):
        dump(model)


def test_state_dicts_are_plain_tensors(model, expected, plain_folder):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = reload(plain_folder, quantization_config=settings(seed=1))
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for module in quantized_linears(other).values():
        module.prepare()
    assert torch.equal(logits(other), expected)


# --- dequantize ---------------------------------------------------------------------------------------------------------


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


# --- generate -----------------------------------------------------------------------------------------------------------


def padded():
    ids, mask = sample_ids(2, 12, seed=5), torch.ones(2, 12, dtype=torch.long)
    ids[0, :4], ids[0, 4], mask[0, :4] = PAD, BOS, 0
    return {"input_ids": ids, "attention_mask": mask}


def continued(model, inputs, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def test_generate_in_every_way(model):
    inputs = padded()
    greedy = continued(model, inputs)
    for options in (
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
    ):
        assert torch.equal(continued(model, inputs, **options), greedy), options
    for row, start in enumerate((4, 0)):
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert torch.equal(continued(model, alone), greedy[row : row + 1])
    whole = {key: value[1:] for key, value in inputs.items()}
    assistant = quantized("qwen2", {"seed": 2})
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(continued(model, whole, **options), greedy[1:]), options
    beams = continued(model, inputs, num_beams=3)
    assert torch.equal(beams, continued(model, inputs, num_beams=3, use_cache=False))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_cache_is_quantized_as_the_config_says(bits, tmp_path):
    model = quantized("qwen2", kv_bits=bits, weight_bits=16, activation_bits=16)  # the cache's error alone
    ids = sample_ids(2, 12, seed=5)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
    assert all(type(layer) is FreeActCacheLayer for layer in output.past_key_values.layers)
    assert output.past_key_values.layers[0].spec.bits == bits
    exact = logits(model, use_cache=False)
    assert 0 < distance(output.logits, exact) < (0.5 if bits == 4 else 0.03)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert torch.equal(logits(again), output.logits)
    inputs = padded()
    text = continued(again, inputs)
    for row, start in enumerate((4, 0)):
        alone = {key: value[row : row + 1, start:] for key, value in inputs.items()}
        assert torch.equal(continued(again, alone), text[row : row + 1])
    assert torch.equal(logits(copy.deepcopy(again)), output.logits)
    again.dequantize()
    with torch.no_grad():
        cache = again(input_ids=ids, use_cache=True).past_key_values
    assert not any(isinstance(layer, FreeActCacheLayer) for layer in cache.layers)


def test_pipeline(folder):
    text = pipeline("text-generation", str(folder))("Hello", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("Hello")


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_graph_breaks():
    """One graph, run eagerly: making kernels of it takes a minute (and works: max difference 2e-6)."""
    model = quantized("llama", {"num_hidden_layers": 1})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled, use_cache=False), logits(model, use_cache=False))
