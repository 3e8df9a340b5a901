"""Every family: unchanged logits at 16 bits, known groups of linears, what stays and why, save and load."""

import logging

import pytest
import torch
import transformers
from torch import nn

from optimum_freeact.api import quantize
from optimum_freeact.modules import layout
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.layout import find_blocks, unquantized_parameters
from optimum_freeact.modules.surgery import quantized_linears
from optimum_freeact.presets import PRESETS
from tests.helpers.quantized import distance, logits, quantized, reload, settings
from tests.helpers.tiny_models import DECODERS, EXPERTS, FALLBACK, KNOWN, plant_sink, sample_ids, tiny


QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
LLAMA = [QKV, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
EXPECTED = {
    **dict.fromkeys(KNOWN, LLAMA),
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "gpt_neox": [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]],
    "falcon": [
        ["self_attention.query_key_value"],
        ["self_attention.dense"],
        ["mlp.dense_h_to_4h"],
        ["mlp.dense_4h_to_h"],
    ],
    "stablelm": LLAMA,
    "opt": [QKV, ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    **dict.fromkeys(EXPERTS, [QKV, ["self_attn.o_proj"]]),
}
assert set(EXPECTED) == {*DECODERS, *EXPERTS}
EXACT = {"weight_bits": 16, "activation_bits": 16}


@pytest.mark.parametrize("family", EXPECTED)
def test_sixteen_bits_change_nothing_and_groups_are_right(family):
    plain, model = tiny(family), tiny(family)
    quantize(model, settings(**EXACT))
    assert model.config.quantization_config.input_groups == {"*": EXPECTED[family]}
    assert len(quantized_linears(model)) == 2 * sum(map(len, EXPECTED[family]))
    assert distance(logits(model), logits(plain)) < 1e-5


@pytest.mark.parametrize(
    ("transform", "centring", "scale"),
    [
        ("none", "none", "none"),
        ("none", "shared", "smoothquant"),
        ("hadamard", "per_type", "closed_form"),
        ("kronecker", "shared", "none"),
        ("kronecker", "per_type", "smoothquant"),
        ("orthogonal", "per_type", "closed_form"),
    ],
)
def test_sixteen_bits_change_nothing_with_any_map(transform, centring, scale):
    model = quantized("qwen2", transform=transform, centring=centring, channel_scale=scale, **EXACT)
    assert distance(logits(model), logits(tiny("qwen2"))) < 1e-5


@pytest.mark.parametrize("family", EXPECTED)
def test_four_bits_are_near_and_survive_the_disk(family, tmp_path):
    model = quantized(family)
    expected = logits(model)
    assert 1e-3 < distance(expected, logits(tiny(family))) < 0.75
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), expected)


def test_a_massive_sink_of_its_own_type_costs_the_others_nothing():
    found = []
    for sink in (False, True):
        plain, model = tiny("llama"), tiny("llama")
        for each in (plain, model) if sink else ():
            plant_sink(each)
        quantize(model, settings(low_rank=0))
        found.append(distance(logits(model)[:, 1:], logits(plain)[:, 1:]))
    assert found[1] < 1.2 * found[0]


@pytest.mark.parametrize("family", FALLBACK)
def test_the_fallback_needs_no_table(family):
    assert tiny(family).config.model_type not in layout.INPUT_GROUPS


@pytest.mark.parametrize("family", KNOWN)
def test_table_and_fallback_agree(family, monkeypatch):
    monkeypatch.setattr(layout, "INPUT_GROUPS", {})
    assert quantized(family).config.quantization_config.input_groups == {"*": EXPECTED[family]}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_reported(family, caplog):
    with caplog.at_level(logging.WARNING, "optimum_freeact"):
        model = quantized(family, modules_to_not_convert=["experts"])
    assert "mixture-of-experts tensors (model.layers.0.mlp.experts" in caplog.text
    prefix, blocks = find_blocks(model)
    reasons = unquantized_parameters(model, prefix, blocks)
    assert sum("experts" in reason for reason in reasons.values()) == 4
    assert any("gate" in name or "router" in name for name in reasons)
    assert "outside the decoder blocks (model.layers)" in reasons["model.embed_tokens.weight"]


def test_excluded_linears_stay_and_are_listed(tmp_path):
    model = quantized("llama", modules_to_not_convert=["down_proj", "layers.1.self_attn"])
    kept = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    attention = {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"}
    assert kept == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", *attention}
    prefix, blocks = find_blocks(model)
    reasons = unquantized_parameters(model, prefix, blocks)
    assert {f"{name}.weight" for name in kept} | {"model.embed_tokens.weight"} == set(reasons)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_presets_run_on_a_tiny_model():
    wanted = logits(tiny("llama"))
    found = {name: distance(logits(quantized(preset=name)), wanted) for name in ("rtn", "smoothquant", "quarot")}
    found["freeact"] = distance(logits(quantized()), wanted)
    assert all(value < 1 for value in found.values())
    assert found["freeact"] == min(found.values())


_SMALL = {"vocab_size": 104, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_STATES = {"mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_state": 16}
RECURRENT = {  # blocks of recurrent states between or instead of attention, each in its own way unlike a Llama's
    "bamba": ("Bamba", {**_SMALL, **_HEADS, **_STATES, "attn_layer_indices": [1]}),  # blocks return tuples
    "jamba": (  # reads the bias of a linear, and gives it another for a moment
        "Jamba",
        {**_SMALL, **_HEADS, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4, "num_experts": 2},
    ),
    "recurrent_gemma": (  # initialises linears from the module around them
        "RecurrentGemma",
        {**_SMALL, **_HEADS, "head_dim": 16, "lru_width": 64, "block_types": ["recurrent", "attention"]},
    ),
    "mamba": ("Mamba", {**_SMALL, "state_size": 16, "time_step_rank": 4}),  # a cache without a length
}


def recurrent(family):
    name, fields = RECURRENT[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields)).eval()


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_blocks(family, tmp_path, caplog):
    exact = quantize(recurrent(family), settings(**EXACT))
    assert distance(logits(exact, use_cache=False), logits(recurrent(family), use_cache=False)) < 1e-4
    model = quantize(recurrent(family), settings())
    assert distance(logits(model, use_cache=False), logits(recurrent(family), use_cache=False)) < 0.6
    read = {name for name, module in model.named_modules() if type(module) is nn.Linear and "dt_proj" in name}
    assert bool(read) == (family in ("jamba", "mamba"))
    if read:
        assert "the model reads their weights itself" in caplog.text
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, use_cache=False), logits(model, use_cache=False))
    ids = sample_ids(2, 6)
    text = again.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert text.shape == (2, 10)
    for length in range(6, 10):  # step by step as at once: the second step knows that it is not the first
        following = again(input_ids=text[:, :length], use_cache=False).logits[:, -1].argmax(-1)
        assert torch.equal(following, text[:, length])
    reasons = unquantized_parameters(model, *find_blocks(model))
    convolutions = [name for name in reasons if "conv" in name]
    assert convolutions
    assert all(reasons[name] == "of a Conv1d, not of an nn.Linear" for name in convolutions)


def test_watching_leaves_linears_as_they_were():
    model = tiny("opt")
    layers = list(model.modules())
    quantize(model, settings(modules_to_not_convert=["fc1", "k_proj"]))
    left = [module for module in layers if isinstance(module, nn.Linear) and module in list(model.modules())]
    assert len(left) == 5  # two blocks' two, and the head
    assert all(type(module) is nn.Linear and not {"_called", "_was_read"} & vars(module).keys() for module in left)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits", [(4, 4, 8), (4, 16, 4), (8, 8, 16), (16, 4, 16), (16, 16, 4)], ids=str)
def test_every_preset_runs_with_any_bits_and_survives_the_disk(preset, bits, tmp_path):
    changes = dict(zip(("weight_bits", "activation_bits", "kv_bits"), bits))
    model = quantized("llama", {"num_hidden_layers": 1}, preset=preset, epochs=1, **changes)
    plain = tiny("llama", num_hidden_layers=1)
    assert distance(logits(model, use_cache=False), logits(plain)) < (0.05 if min(bits[:2]) > 4 else 1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), use_cache=True), logits(model, use_cache=True))


@pytest.mark.parametrize("transform", ["none", "hadamard", "kronecker", "orthogonal"])
@pytest.mark.parametrize(("hidden", "inner"), [(74, 62), (106, 254), (58, 97)])  # 2 x primes, and an odd width
def test_awkward_widths(transform, hidden, inner, tmp_path):
    size = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1, "head_dim": 16}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    exact = quantized("llama", size, transform=transform, **EXACT)
    assert distance(logits(exact), logits(tiny("llama", **size))) < 1e-5
    for bits in (4, 8):
        if bits == 4 and inner % 2:
            with pytest.raises(ValueError, match=f"'model.layers.0.mlp.down_proj' has an odd in_features={inner}"):
                quantized("llama", size, transform=transform)
            continue
        model = quantized("llama", size, transform=transform, weight_bits=bits, activation_bits=bits)
        assert distance(logits(model), logits(exact)) < (0.05 if bits == 8 else 0.8)
        model.save_pretrained(tmp_path / str(bits))
        assert torch.equal(logits(reload(tmp_path / str(bits))), logits(model))


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_columns(group, bits, tmp_path):
    model = quantized(weight_group_size=group, weight_bits=bits)
    linear = model.model.layers[0].mlp.up_proj
    assert linear.qscale.shape == (96, 1)
    assert linear.weight_group_scale.shape == (96, 64 // group)
    assert linear.weight_group_scale.dtype == torch.int8
    assert (linear.weight_group_scale.int().abs().amax(1) == 127).all()
    assert (linear.weight_group_scale != 0).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_weights_first_as_published(monkeypatch):
    """Every input is measured behind quantized weights and unrounded activations; rounding comes back afterwards."""
    from optimum_freeact.calibration.stream import Stream

    read = {}
    plain = Stream.input_moments

    def watched(self, block, index, linear, *args):
        found = plain(self, block, index, linear, *args)
        read[index, linear.in_features, linear.out_features] = found.mean()
        return found

    monkeypatch.setattr(Stream, "input_moments", watched)
    published = {"preset": "quarot", "sequential": True, "rounding_order": "columns", "rounding_noise": False}
    model = quantized(**published)
    assert len(read) == 2 * 3  # the first input of a block is known already
    assert all(side.bits == 4 for side in model.modules() if isinstance(side, FreeActInput))
    assert distance(logits(model), logits(quantized(preset="quarot"))) > 1e-3
    exact = quantized(**published, activation_bits=16)
    for name, linear in quantized_linears(model).items():  # activations never reached the weights
        assert torch.equal(linear.weight, exact.get_submodule(name).weight), name
    with pytest.raises(ValueError, match="sequential=True goes with .*propagate_error=True"):
        quantized(**published, propagate_error=False)


def test_a_preset_s_group_size_that_does_not_divide_is_replaced_and_recorded(tmp_path, caplog):
    """48 columns: groups of 16; 36 columns: one grid a row. A size that the caller gave is refused instead."""
    for width, expected in ((48, 16), (36, None)):
        caplog.clear()
        model = quantized(model={"intermediate_size": width})
        settings = model.config.quantization_config
        assert (settings.weight_group_size, settings.activation_group_size) == (expected, expected)
        assert f"weight_group_size=32 of preset 'freeact' does not divide in_features={width}" in caplog.text
        assert (model.model.layers[0].mlp.up_proj.weight_group_scale is not None) == (expected is not None)
        model.save_pretrained(tmp_path / str(width))
        assert torch.equal(logits(reload(tmp_path / str(width))), logits(model))
        with pytest.raises(ValueError, match=f"weight_group_size=32 does not divide in_features={width}"):
            quantized(model={"intermediate_size": width}, weight_group_size=32)


def test_finer_grids_of_activations_lose_less_and_survive_the_disk(tmp_path):
    errors = {}
    for size in (None, 32, 8):
        model = quantized(activation_group_size=size, weight_bits=16)
        errors[size] = distance(logits(model), logits(tiny("llama")))
    assert errors[8] < errors[32] < errors[None]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_learned_calibration_starts_from_the_closed_form_and_is_kept_only_if_better(tmp_path):
    model = quantized(calibration="learned", learned_part="maps", epochs=2, n_samples=6, batch_size=2)
    for record in model._freeact_records:
        assert record.learned["accepted"] == (record.learned["held_out_after"] < record.learned["held_out_before"])
        assert record.output_error <= record.learned["held_out_before"] * 1.001
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_the_same_seed_gives_the_same_model_and_another_another():
    first, again, other = (quantized(seed=seed) for seed in (0, 0, 1))
    ids = sample_ids(2, 12, seed=5)
    assert torch.equal(logits(first, ids), logits(again, ids))
    assert not torch.equal(logits(first, ids), logits(other, ids))


@pytest.mark.parametrize("budget", [0.02, 0.2, 0.3])
def test_the_rank_is_what_fits_beside_all_else_that_is_stored(budget):
    """Each input with its linears: within the budget, and one direction more would not be, unless the rank is at a bound."""
    found = set()
    model = quantized(low_rank=20, low_rank_budget=budget, model={"hidden_size": 128, "intermediate_size": 384})
    linears = quantized_linears(model)
    for side in (module for module in model.modules() if isinstance(module, FreeActInput)):
        readers = [linear for linear in linears.values() if linear.source is side]
        rank, m = side.basis.shape[1], sum(linear.out_features for linear in readers)
        stored = sum(t.numel() * t.element_size() for module in (side, *readers) for t in module.state_dict().values())
        beside = stored - side.in_features * m // 2  # four bits a code
        limit, each = budget * 2 * side.in_features * m, side.in_features + m + 4 * (1 + len(readers))
        assert beside <= limit or rank == 8
        assert beside + each > limit or rank == min(20, side.in_features // 8)
        found.add(rank)
    assert found <= {*range(8, 21)}
    assert (max(found) > 8) == (budget > 0.1)


def test_shrinkage_makes_weights_smaller_and_is_nothing_where_nothing_is_rounded():
    data = {"dataset": sample_ids(64, 24), "n_samples": 64, "weight_bits": 16}
    plain, shrunk = (quantized(rounding_shrinkage=each, **data) for each in (False, True))
    for name, linear in quantized_linears(plain).items():
        other = quantized_linears(shrunk)[name].transformed_weight()
        assert 0.5 < float(other.square().sum() / linear.transformed_weight().square().sum()) < 1, name
    exact = quantized(**data, activation_bits=16, rounding_shrinkage=True)
    assert distance(logits(exact), logits(tiny("llama"))) < 1e-5
    few = {"dataset": sample_ids(8, 24), "n_samples": 8}  # under six tokens for each entry of an input
    assert torch.equal(
        logits(quantized(**few, rounding_shrinkage=True)), logits(quantized(**few, rounding_shrinkage=False))
    )


def test_learned_outputs_keep_codes_and_are_kept_only_if_better(tmp_path):
    start = quantized(n_samples=6, batch_size=2)
    model = quantized(calibration="learned", learned_part="outputs", epochs=3, n_samples=6, batch_size=2)
    for record in model._freeact_records:
        assert record.learned["last_loss"] < record.learned["first_loss"]
        assert record.learned["accepted"] == (record.learned["held_out_after"] < record.learned["held_out_before"])
    first = [(name, linear) for name, linear in quantized_linears(model).items() if ".0." in name]
    for name, linear in first:  # the second block reads other inputs
        assert torch.equal(linear.weight, start.get_submodule(name).weight), name
        assert torch.equal(linear.weight_group_scale, start.get_submodule(name).weight_group_scale)
    if model._freeact_records[0].learned["accepted"]:
        assert any(not torch.equal(linear.qscale, start.get_submodule(name).qscale) for name, linear in first)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


@pytest.mark.parametrize("part", ["maps", "outputs"])
def test_what_is_learned_never_sees_the_held_out_batch_and_harm_is_taken_back(part, monkeypatch):
    """With a learning rate that ruins everything, the result is the closed form's, bit for bit."""
    from optimum_freeact.calibration import learned as module

    seen, run = [], module.learn

    def watched(block, twins, parameters, forget, run_batch, targets, config):
        return run(
            block,
            twins,
            parameters,
            forget,
            lambda i: (seen.append((i, len(targets))), run_batch(i))[1],
            targets,
            config,
        )

    monkeypatch.setattr("optimum_freeact.calibration.refinement.learn", watched)
    changes = {"n_samples": 6, "batch_size": 2}
    model = quantized(calibration="learned", learned_part=part, epochs=2, learning_rate=50.0, **changes)
    assert {i for i, _ in seen} == {0, 1}
    assert {n for _, n in seen} == {3}
    assert not any(record.learned["accepted"] for record in model._freeact_records)
    judged = [
        (record.learned["held_out_before"], record.learned["held_out_after"]) for record in model._freeact_records
    ]
    assert not any(after <= 2 * before for before, after in judged)  # much worse, or not finite
    start = quantized(**changes)
    assert torch.equal(logits(model), logits(start))


def test_a_type_with_a_thousand_times_the_energy_does_not_decide_the_loss():
    from optimum_freeact.calibration.learned import Target

    output = torch.randn(2, 8, 4)
    types = torch.zeros(2, 8, dtype=torch.long)
    types[:, 0] = 1
    output[:, 0] *= 1000
    wrong = output.clone()
    wrong[:, 0] += 100  # a hundredth of the sink's energy
    text = output.clone()
    text[:, 1:] += 1  # all of the text's
    assert Target(output, types).loss(text) > 20 * Target(output, types).loss(wrong)
    assert Target(output, None).loss(text) < Target(output, None).loss(wrong)
