"""Whole merges on tiny models through mergekit: exactness, alpha, tying, determinism, both recipe forms."""

import hashlib
import json

import pytest
import torch
import yaml
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_ot.pipeline import merge_recipe, plan_recipe
from mergekit_ot.recipe import load_recipe
from mergekit_ot.relatives import deepened, permuted, rotated, widened
from tests.merge.tiny import FAMILIES, build, checkpoint, from_checkpoint, save, texts, write_texts


OPTIONS = MergeOptions(quiet=True)
COPIES = {
    "same": lambda config, state: (config, state),
    "permuted": permuted,
    "widened": widened,
    "deepened": deepened,
    "rotated": rotated,
    "permuted and rotated": lambda config, state: permuted(*rotated(config, state)),
}


def write_recipe(folder, target, donor, **changes):
    """A recipe file; `changes` go under parameters, except top-level keys."""
    write_texts(folder / "texts.txt", texts(120))
    top = {key: changes.pop(key) for key in ("dtype", "calibration", "models") if key in changes}
    recipe = {
        "merge_method": "transport",
        "base_model": str(target),
        "models": [{"model": str(target)}, {"model": str(donor)}],
        "parameters": {"alpha": 1.0} | changes,
        "calibration": {"dataset": "texts.txt", "rows": 600, "max_length": 96},
    } | top
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def pair(folder, family="llama", copy="permuted", tied=True, **sizes):
    """A target and a re-parameterised copy of it, saved."""
    model = build(family, tied=tied, **sizes)
    if "rotated" in copy and family == "gemma3_text":
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.data.fill_(0.2)
    donor = from_checkpoint(*COPIES[copy](*checkpoint(model)))
    return model, save(model, folder / "target"), save(donor, folder / "donor")


def logits(model):
    ids = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


def distance(found, expected):
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_merged_at_alpha_one_is_the_target(tmp_path, family, copy):
    model, target, donor = pair(tmp_path, family, copy, tied=family != "qwen2")
    recipe = load_recipe(write_recipe(tmp_path, target, donor))
    out = merge_recipe(recipe, tmp_path / "out", OPTIONS)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert merged.config.model_type == family
    assert distance(logits(merged), logits(model)) < 1e-5
    moved = [n for n, p in merged.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    for name in moved:
        assert distance(merged.get_parameter(name), model.get_parameter(name)) < 1e-5
    if copy != "same":
        assert moved  # otherwise nothing was transported
    info = json.loads((out / "transport.json").read_text())["plans"]
    assert info["layer_map"] == ([0, 2, 3, 5] if copy == "deepened" else [0, 1, 2, 3])
    assert info["residual"]["map"] == ("procrustes" if "rotated" in copy else "ot")


def test_output_is_an_ordinary_checkpoint_with_a_card(tmp_path):
    _, target, donor = pair(tmp_path)
    (donor / "README.md").write_text("---\nlicense: mit\n---\n")
    out = merge_recipe(load_recipe(write_recipe(tmp_path, target, donor)), tmp_path / "out", OPTIONS)
    from safetensors import safe_open

    with safe_open(next(out.glob("*.safetensors")), framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - tied heads are not written twice
    card = (out / "README.md").read_text()
    assert str(donor) in card
    assert "| mit |" in card
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("alpha1")["input_ids"] == AutoTokenizer.from_pretrained(target)("alpha1")["input_ids"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alpha_zero_is_byte_identical_and_filters_hold(tmp_path, dtype):
    model, target, donor = pair(tmp_path, copy="rotated")
    kind = getattr(torch, dtype)
    alpha = [{"filter": "mlp", "value": 0.5}, {"value": [0.0, 0.0]}]
    out = merge_recipe(
        load_recipe(write_recipe(tmp_path, target, donor, alpha=alpha, dtype=dtype)), tmp_path / "out", OPTIONS
    )
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=kind)
    for name, parameter in merged.named_parameters():
        same = torch.equal(parameter, model.get_parameter(name).to(kind))
        assert same or "mlp" in name
    assert parameter.dtype == kind
    zero = merge_recipe(load_recipe(tmp_path / "recipe.yml"), tmp_path / "zero", OPTIONS, alpha=0.0)
    merged = AutoModelForCausalLM.from_pretrained(zero, dtype=kind)
    assert all(torch.equal(p, model.get_parameter(n).to(kind)) for n, p in merged.named_parameters())


def test_stock_schema_through_mergekit_itself(tmp_path, monkeypatch):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge

    import mergekit_ot

    monkeypatch.chdir(tmp_path)
    model, target, donor = pair(tmp_path)
    write_texts(tmp_path / "texts.txt", texts(120))
    stock = {
        "merge_method": "transport",
        "base_model": str(target),
        "models": [{"model": str(target)}],
        "parameters": {
            "donor": str(donor),
            "alpha": "1e0",
            "calibration_dataset": "texts.txt",
            "calibration_rows": 600,
        },
    }
    mergekit_ot.register()
    assert mergekit_ot.register() is mergekit_ot.register()
    run_merge(MergeConfiguration.model_validate(stock), str(tmp_path / "out"), options=OPTIONS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert distance(logits(merged), logits(model)) < 1e-5
    (tmp_path / "stock.yml").write_text(yaml.safe_dump(stock))
    again = merge_recipe(load_recipe(tmp_path / "stock.yml"), tmp_path / "again", OPTIONS)
    assert _digest(again) == _digest(tmp_path / "out")


def _digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_plans_are_reused_and_threads_agree(tmp_path):
    _, target, donor = pair(tmp_path, copy="rotated", num_hidden_layers=1)
    few = {"dataset": "texts.txt", "rows": 150, "max_length": 96}  # two threads on a busy core wait for each other
    recipe = load_recipe(write_recipe(tmp_path, target, donor, alpha=0.5, calibration=few))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _, one, folder = plan_recipe(recipe, tmp_path / "one", quiet=True)
    stamp = (folder / "plans.safetensors").stat().st_mtime_ns
    plan_recipe(recipe, tmp_path / "one", quiet=True)
    assert (folder / "plans.safetensors").stat().st_mtime_ns == stamp
    torch.set_num_threads(2)
    _, two, _ = plan_recipe(recipe, tmp_path / "two", quiet=True)
    torch.set_num_threads(before)
    for name, tensor in one.tensors.items():
        assert (tensor.double() - two.tensors[name].double()).abs().max() < 1e-6
    assert not (tmp_path / "one.rows").exists()
