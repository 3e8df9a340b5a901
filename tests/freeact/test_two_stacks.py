"""DiffusionGemma: encoder and decoder on the same tensors, types prompt and canvas, a `generate` that calls both directly."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

from optimum_freeact.api import quantize
from optimum_freeact.calibration.canvas import canvas_length, one_chain, with_noise
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.modules.surgery import quantized_linears
from optimum_freeact.modules.twins import Twin
from optimum_freeact.report.inspection import inspect_model
from optimum_freeact.report.type_report import measure_types
from optimum_freeact.token_types import TokenTyper
from optimum_freeact.type_rules import resolve
from optimum_freeact.type_state import attach_state
from tests.helpers.tiny_models import randomize_


transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
    pytest.skip("this transformers has no DiffusionGemma", allow_module_level=True)

IMAGE, CANVAS = 92, 8
SETTINGS = {"n_samples": 12, "seq_len": 24, "batch_size": 4, "modules_to_not_convert": ["router"]}


def make(**changes):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    kinds = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 8}
    text = transformers.DiffusionGemmaTextConfig(
        **{
            **sizes,
            **heads,
            "num_global_key_value_heads": 2,
            **experts,
            **kinds,
            "max_position_embeddings": 128,
            **changes,
        }
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16}
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config={"model_type": "gemma4_vision", **vision},
        boi_token_id=90, eoi_token_id=91, image_token_id=IMAGE, canvas_length=CANVAS,
    )  # fmt: skip
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    randomize_(model)
    for stack, most in ((model.model.encoder.language_model, 1.1), (model.model.decoder, 0.9)):
        for index, layer in enumerate(stack.layers):  # the one part that is not tied
            layer.layer_scalar.fill_(most - 0.1 * index)
    return model


def ids_of(rows, length, seed=0):
    return torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def quantized(model=None, **changes):
    settings = {**SETTINGS, "dataset": ids_of(12, 24, seed=3), **changes}
    return quantize(make() if model is None else model, FreeActConfig(**settings))


@torch.no_grad()
def logits(model, prompt, canvas):
    return model(input_ids=prompt, decoder_input_ids=canvas).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [8, 13])  # within the window of the sliding blocks, and beyond
def test_one_chain_is_what_encoder_and_decoder_compute(attention, length):
    model = make().double()
    model.set_attn_implementation(attention)
    model.set_experts_implementation("eager")  # the others have no float64
    prompt, canvas = ids_of(2, length), ids_of(2, CANVAS, seed=1)
    names, rules = resolve(model, ["text", "sink", "auto"], None, None)
    state, both = attach_state(model), torch.cat((prompt, canvas), 1)
    scalars = [layer.layer_scalar for layer in model.model.decoder.layers]
    with torch.no_grad():
        expected = model.model(input_ids=prompt, decoder_input_ids=canvas)
        with one_chain(model, both, TokenTyper(names, rules), state):
            found = model(both)
        again = model.model(input_ids=prompt, decoder_input_ids=canvas).last_hidden_state
    assert torch.allclose(found[:, :length], expected.encoder_last_hidden_state, atol=1e-5)
    assert torch.allclose(found[:, length:], expected.last_hidden_state, atol=1e-5)
    assert names == ["text", "sink", "image", "canvas"]
    assert state.types.tolist() == [[1] + [0] * (length - 1) + [3] * canvas_length(model, length + CANVAS)] * 2
    assert torch.equal(again, expected.last_hidden_state)  # all is as it was
    assert all(layer.layer_scalar is own for layer, own in zip(model.model.decoder.layers, scalars))


def test_the_canvas_is_noised_at_all_shares_and_the_prompt_is_not():
    model, samples = make(), torch.full((40, 24), 5)
    found = with_noise(model, samples, seed=0)
    assert torch.equal(found[:, :-CANVAS], samples[:, :-CANVAS])
    kept = (found[:, -CANVAS:] == 5).float().mean(1)
    assert kept.min() < 0.2 < 0.8 < kept.max()
    assert 0.4 < kept.mean() < 0.6
    assert canvas_length(model, 10) == 5


def test_one_weight_serves_both_stacks_each_type_with_its_own_mean(caplog):
    model = make()
    prompt, canvas = ids_of(2, 12, seed=8), ids_of(2, CANVAS, seed=9)
    expected = logits(model, prompt, canvas)
    model = quantized(model, weight_bits=8, activation_bits=8)
    assert float((logits(model, prompt, canvas) - expected).norm() / expected.norm()) < 0.2  # experts are chosen anew
    assert "of type ['image']" in caplog.text
    for block, twin in zip(model.model.decoder.layers, model.model.encoder.language_model.layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "experts"):
            assert twin.get_submodule(name).of is block.get_submodule(name)
    mean = model.model.decoder.layers[0].self_attn.q_proj.source.mean.float()
    assert (mean[3] - mean[0]).norm() > 0.2 * mean[0].norm()
    config = model.hf_quantizer.quantization_config
    assert config.type_rules["canvas"] == {"module": "decoder"}


def seen_types(model):
    """What the first linear of a block is told, by the stack that calls it."""
    told = []
    for stack, name in ((model.model.encoder.language_model, "prompt"), (model.model.decoder, "canvas")):

        def note(module, args, name=name):  # noqa: ARG001
            types = model.__dict__["_freeact_state"].types
            told.append((name, None if types is None else types.tolist()))

        stack.layers[1].input_layernorm.register_forward_pre_hook(note)
    return told


def test_types_reach_both_stacks_when_generate_goes_past_the_hooks_around():
    model = quantized()
    told = seen_types(model)
    prompt = ids_of(2, CANVAS)  # as long as the canvas: types of the one would fit the other
    prompt[1, 3] = IMAGE
    text = model.generate(prompt, max_new_tokens=2 * CANVAS, do_sample=False)
    assert text.sequences.shape[1] > CANVAS
    assert told[0] == ("prompt", [[1] + [0] * 7, [1, 0, 0, 2, 0, 0, 0, 0]])
    assert all(types == [[3] * CANVAS] * 2 for name, types in told if name == "canvas")
    later = [types for name, types in told[1:] if name == "prompt"]
    assert all(types == [[0] * CANVAS] * 2 for types in later)  # a finished canvas is prompt; no sink in its middle


def test_left_padding_moves_the_sink():
    model = quantized()
    told = seen_types(model)
    prompt, mask = ids_of(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    model.generate(prompt, attention_mask=mask, max_new_tokens=CANVAS, do_sample=False)
    assert told[0][1][1] == [1, 0, 0, 0, 0, 0]
    assert told[0][1][0][2:] == [1, 0, 0, 0]


def test_without_a_type_of_its_own_the_canvas_is_text():
    model = quantized(token_types=["text", "sink"])
    told = seen_types(model)
    with torch.no_grad():
        model(input_ids=ids_of(1, CANVAS), decoder_input_ids=ids_of(1, CANVAS))
    assert told == [("prompt", [[1] + [0] * 7]), ("canvas", None)]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_trained_through_it_knows_its_canvas():
    model = quantized()
    told = seen_types(model)
    prompt, canvas = ids_of(2, 12), ids_of(2, CANVAS, seed=1)
    expected = logits(model, prompt, canvas)
    with torch.no_grad():
        read = model.model.encoder(input_ids=prompt)
        found = torch.compile(model.model.decoder, backend="eager")(
            cache=read.cache, decoder_attention_mask=torch.ones(2, 12 + CANVAS), decoder_input_ids=canvas
        )
    assert told[-1] == ("canvas", [[3] * CANVAS] * 2)
    hidden = model.lm_head(found.last_hidden_state)
    assert torch.allclose(torch.tanh(hidden / 30) * 30, expected, atol=1e-4)
    model.gradient_checkpointing_enable()
    model.train()
    told.clear()
    model(input_ids=prompt, decoder_input_ids=canvas).logits.sum().backward()
    assert [kinds for name, kinds in told if name == "canvas"] == [[[3] * CANVAS] * 2] * 2  # computed twice


def test_it_is_saved_once_and_read_again(tmp_path):
    model = quantized()
    prompt, canvas = ids_of(2, 12, seed=8), ids_of(2, CANVAS, seed=9)
    expected = logits(model, prompt, canvas)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        twice = [name for name in file.keys() if "encoder.language_model" in name]  # noqa: SIM118
    assert twice == [f"model.encoder.language_model.layers.{i}.layer_scalar" for i in range(3)]
    again = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, prompt, canvas), expected)
    assert (
        inspect_model(again.config, tmp_path, torch.device("cpu")).size.n_linears
        == len(quantized_linears(again)) + 3 * 4 * 2
    )
    again.save_pretrained(tmp_path / "again")
    inner = transformers.DiffusionGemmaModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        found = inner(input_ids=prompt, decoder_input_ids=canvas).last_hidden_state
        assert torch.equal(found, again.model(input_ids=prompt, decoder_input_ids=canvas).last_hidden_state)


def test_while_loading_it_is_quantized_too(tmp_path):
    make().save_pretrained(tmp_path)
    config = FreeActConfig(**SETTINGS, dataset=ids_of(12, 24, seed=3))
    model = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path, quantization_config=config).eval()
    prompt, canvas = ids_of(2, 12, seed=8), ids_of(2, CANVAS, seed=9)
    assert isinstance(model.model.encoder.language_model.layers[0].self_attn.q_proj, Twin)
    assert torch.equal(logits(model, prompt, canvas), logits(quantized(), prompt, canvas))


def test_a_copy_has_twins_of_its_own():
    model = quantized()
    other = copy.deepcopy(model)
    twin = other.model.encoder.language_model.layers[0].self_attn.q_proj
    assert twin.of is other.model.decoder.layers[0].self_attn.q_proj
    assert twin.of is not model.model.decoder.layers[0].self_attn.q_proj
    prompt, canvas = ids_of(2, 12, seed=8), ids_of(2, CANVAS, seed=9)
    assert torch.equal(logits(other, prompt, canvas), logits(model, prompt, canvas))


def test_dequantized_the_stacks_are_tied_as_before(tmp_path):
    model = quantized(weight_bits=8, activation_bits=8)
    prompt, canvas = ids_of(2, 12, seed=8), ids_of(2, CANVAS, seed=9)
    expected = logits(model, prompt, canvas)
    model = model.dequantize()
    assert not [m for m in model.modules() if isinstance(m, (Twin, FreeActLinear))]
    pairs = [s.layers[1] for s in (model.model.encoder.language_model, model.model.decoder)]
    assert type(pairs[0].mlp.up_proj) is nn.Linear
    assert pairs[0].mlp.up_proj is not pairs[1].mlp.up_proj
    assert pairs[0].mlp.up_proj.weight is pairs[1].mlp.up_proj.weight
    assert pairs[0].experts.down_proj is pairs[1].experts.down_proj
    found = logits(model, prompt, canvas)
    assert float((found - expected).norm() / expected.norm()) < 0.2
    model.save_pretrained(tmp_path)
    again = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, prompt, canvas), found)


def test_the_report_tells_prompt_and_canvas_apart():
    rows = measure_types(make(), ids_of(16, 24), FreeActConfig(**SETTINGS, dataset=ids_of(2, 4)))
    assert {row.type for row in rows} >= {"text", "canvas"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_bits": 4}, "kv_bits=4"),
        ({"dataset": [{"input_ids": torch.ones(1, 24, dtype=torch.long)}] * 12}, "calibrated on text"),
        ({"preset": "quarot", "token_types": ["text"], "discovered_types": 4}, "discovered_types=4"),
    ],
)
def test_what_is_not_built_is_refused_before_anything_is_changed(changes, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        quantized(model, **changes)
    assert type(model.model.decoder.layers[0].self_attn.q_proj) is nn.Linear
