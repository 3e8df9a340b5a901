"""Settings that change what is merged: presets of the paper, shared embeddings, gates, solvers, explicit layer maps."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_ot.bundle import PlanBundle
from mergekit_ot.controls import random_donor
from mergekit_ot.gate import effective_alpha
from mergekit_ot.layer_map import monotone_map, parse_map
from mergekit_ot.pipeline import merge_recipe, plan_recipe
from mergekit_ot.recipe import load_recipe
from tests.merge.test_finetuned_relatives import trained
from tests.merge.test_pipeline import OPTIONS, distance, logits, pair, write_recipe
from tests.merge.tiny import build, save


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_released_arithmetic_is_shrinking_and_the_corrected_is_not(tmp_path):
    model, target, donor = pair(tmp_path, num_hidden_layers=2)
    ratios = {}
    for preset in ("paper", "paper-released"):
        recipe = load_recipe(write_recipe(tmp_path, target, donor, preset=preset, alpha=0.3))
        out = merge_recipe(recipe, tmp_path / preset, OPTIONS)
        tensors = json.loads((out / "transport.json").read_text())["tensors"]
        assert all("self_attn" in name for name in tensors)
        ratios[preset] = [record["norm_ratio"] for record in tensors.values()]
    assert max(ratios["paper-released"]) < 0.02
    assert min(ratios["paper"]) > 0.2
    shrunk = merge_recipe(recipe, tmp_path / "shrunk", OPTIONS, control="shrink")
    assert distance(logits(load(tmp_path / "paper-released")), logits(load(shrunk))) < 0.01
    assert distance(logits(load(shrunk)), logits(model)) > 0.05


@pytest.mark.parametrize("copy", ["permuted", "widened", "rotated"])
def test_shared_embeddings_of_a_copy_are_the_targets(tmp_path, copy):
    model, target, donor = pair(tmp_path, copy=copy, tied=False)
    out = merge_recipe(
        load_recipe(write_recipe(tmp_path, target, donor, embeddings="shared")), tmp_path / "out", OPTIONS
    )
    merged = load(out)
    assert distance(logits(merged), logits(model)) < 1e-5
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert distance(merged.get_parameter(name), model.get_parameter(name)) < 1e-5
        assert name in json.loads((out / "transport.json").read_text())["tensors"]


def test_an_untrained_donor_closes_the_gate_and_a_relative_opens_it(tmp_path):
    model, finetune, _, _ = trained("llama")
    target, donor = save(model, tmp_path / "target"), save(finetune, tmp_path / "donor")
    stranger = random_donor(donor, tmp_path / "stranger", dtype="float32")
    opened = {}
    for name, folder in (("donor", donor), ("stranger", stranger)):
        recipe = load_recipe(write_recipe(tmp_path, target, folder))
        _, bundle, _ = plan_recipe(recipe, tmp_path / f"{name}-plans", quiet=True)
        values = [value for layer in bundle.info["confidence"]["layers"].values() for value in layer.values()]
        opened[name] = sum(value >= recipe.min_confidence for value in values) / len(values)
    assert opened["donor"] == 1.0
    assert opened["stranger"] <= 0.25  # eight plans of a few channels each; on real models none (benchmarks/merge)
    forced = merge_recipe(recipe, tmp_path / "forced", OPTIONS, plans=tmp_path / "stranger-plans", gate="off")
    closed = merge_recipe(recipe, tmp_path / "closed", OPTIONS, plans=tmp_path / "stranger-plans", min_confidence=1.0)
    assert distance(logits(load(forced)), logits(model)) > 0.5
    assert distance(logits(load(closed)), logits(model)) == 0.0


def test_gates():
    name = "model.layers.1.mlp.up_proj.weight"
    bundle = PlanBundle({}, {"confidence": {"stream": 1.0, "layers": {"1": {"mlp": 0.5, "attn": 0.1}}}})
    assert effective_alpha(0.2, bundle, name, "close", 0.25) == 0.2
    assert effective_alpha(0.2, bundle, name, "scale", 0.25) == 0.1
    assert effective_alpha(0.2, bundle, name.replace("mlp.up", "self_attn.q"), "scale", 0.25) == 0.0
    assert effective_alpha(0.2, bundle, name.replace("mlp.up", "self_attn.q"), "off", 0.25) == 0.2


@pytest.mark.parametrize(
    "settings", [{"solver": "entropic", "reg": 0.03}, {"solver": "entropic", "reg": "auto"}, {"solver": "unbalanced"}]
)
def test_soft_plans_still_find_a_permuted_copy(tmp_path, settings):
    model, target, donor = pair(tmp_path)
    out = merge_recipe(load_recipe(write_recipe(tmp_path, target, donor, **settings)), tmp_path / "out", OPTIONS)
    assert distance(logits(load(out)), logits(model)) < 0.02


def test_modules_and_explicit_layers_limit_what_moves(tmp_path):
    model, target, donor = pair(tmp_path, copy="rotated")
    recipe = load_recipe(write_recipe(tmp_path, target, donor, modules="mlp", layer_map="1:1, 3:2", gate="off"))
    tensors = json.loads((merge_recipe(recipe, tmp_path / "out", OPTIONS) / "transport.json").read_text())["tensors"]
    assert {name.split(".")[2] for name in tensors} == {"1", "3"}
    assert all(".mlp." in name for name in tensors)


def test_across_families_and_tokenizers(tmp_path):
    target = save(build("llama"), tmp_path / "target")
    sizes = {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 3,
        "vocab_size": 400,
    }
    for family in ("qwen2", "gemma3_text"):
        donor = save(build(family, seed=5, **sizes), tmp_path / family, vocab_size=400)
        recipe = load_recipe(write_recipe(tmp_path, target, donor, alpha=0.1, gate="off"))
        out = merge_recipe(recipe, tmp_path / f"{family}-out", OPTIONS)
        info = json.loads((out / "transport.json").read_text())
        assert info["plans"]["layer_map"].count(None) == 1
        assert torch.isfinite(logits(load(out))).all()
        names = {name.split(".")[4] for name in info["tensors"]}
        assert ("q_proj" in names) == (family == "qwen2")  # one-sided query norms keep q and k
        assert {"gate_proj", "down_proj", "v_proj", "o_proj"} <= names


def test_layer_maps():
    similarity = torch.tensor([[0.9, 0.1, 0.2, 0.1], [0.1, 0.1, 0.8, 0.3], [0.1, 0.2, 0.9, 0.7]])
    assert monotone_map(similarity) == [0, 2, 3]
    assert monotone_map(similarity.T) == [0, None, 1, 2]
    assert parse_map("0:0, 2:3", 3, 4) == [0, None, 3]
    for text, message in (
        ("0-1", "look like"),
        ("5:0", "the target has 3 layers"),
        ("0:1,0:2", "names target layer 0 twice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_map(text, 3, 4)
