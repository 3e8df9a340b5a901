"""Recipes are read strictly: every key is known or refused by name, before anything is loaded."""

import copy

import pytest
import yaml

from mergekit_ot.recipe import RecipeError, load_recipe, parse_recipe


GOOD = {
    "merge_method": "transport",
    "base_model": "org/target",
    "models": [{"model": "org/target"}, {"model": "org/donor"}],
    "parameters": {"alpha": [{"filter": "mlp", "value": 0.05}, {"value": [0.0, 0.2]}]},
    "calibration": {"dataset": "texts.jsonl", "samples": 512},
    "dtype": "bfloat16",
}


def changed(**changes):
    recipe = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = recipe
        for parent in parents:
            place = place[parent]
        if value is None:
            place.pop(key)
        else:
            place[key] = value
    return recipe


def test_the_documented_recipe_reads_and_translates():
    recipe = parse_recipe(GOOD)
    assert (recipe.target, recipe.donor, recipe.calibration.samples) == ("org/target", "org/donor", 512)
    stock = recipe.to_mergekit("plans", alpha=0.3)
    assert stock["models"] == [{"model": "org/target"}]
    assert stock["parameters"] | {} == {
        "donor": "org/donor",
        "alpha": 0.3,
        "plan": "plans",
        "gate": "close",
        "min_confidence": recipe.min_confidence,
        "control": "none",
    }
    assert stock["dtype"] == "bfloat16"


def test_both_forms_mean_the_same():
    stock = changed(models=[{"model": "org/target"}], calibration=None)
    stock["parameters"] |= {"donor": "org/donor", "calibration_dataset": "texts.jsonl", "calibration_samples": 512}
    assert parse_recipe(stock) == parse_recipe(GOOD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibraton": {}}, "recipe: unknown key 'calibraton'; did you mean 'calibration'"),
        ({"parameters__alhpa": 0.1}, "parameters: unknown key 'alhpa'; did you mean 'alpha'"),
        ({"calibration__sample": 3}, "calibration: unknown key 'sample'; did you mean 'samples'"),
        ({"merge_method": "linear"}, "merge_method must be 'transport', got 'linear'"),
        ({"base_model": None}, "base_model is missing"),
        ({"models": [{"model": "org/target"}]}, "exactly one donor .* got none"),
        ({"models": [{"model": "org/target"}, {"model": "org/target"}]}, "got the target itself"),
        ({"models": [{"model": "org/a"}, {"model": "org/b"}]}, r"exactly one donor .* got \['org/a', 'org/b'\]"),
        ({"models": [{"model": "org/target"}, {"model": "org/d+org/lora"}]}, "model\\+lora.*merge the LoRA"),
        ({"models": [{"model": "org/donor", "weight": 1}]}, "models: unknown key 'weight'"),
        ({"parameters__alpha": 1.5}, r"parameters.alpha must be a number in \[0, 1\], got 1.5"),
        ({"parameters__alpha": [{"filter": "mlp"}]}, "needs a 'value'"),
        ({"parameters__alpha": [{"filtre": "mlp", "value": 0}]}, "unknown key 'filtre'"),
        ({"parameters__alpha": "much"}, "got 'much'"),
        ({"parameters__gate": "ajar"}, "gate must be one of"),
        ({"parameters__min_confidence": -1}, "min_confidence must be a number"),
        ({"parameters__solver": "greedy"}, "solver must be one of"),
        ({"parameters__reg": 0}, "reg must be 'auto' or a positive number, got 0"),
        ({"parameters__modules": "attn,norms"}, "modules must be one of .* got 'norms'"),
        ({"parameters__calibration_samples": 3}, "calibration.samples is given twice"),
        ({"calibration__samples": 0}, "calibration.samples must be a positive whole number, got 0"),
        ({"calibration__dataset": None}, "calibration.dataset is missing"),
        ({"calibration": None}, "calibration.dataset is missing"),
        ({"dtype": "int4"}, "dtype must be one of .* got 'int4'"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(changed(**changes))


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="There is no recipe"):
        load_recipe(tmp_path / "none.yml")
    (tmp_path / "bad.yml").write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yml")
    (tmp_path / "list.yml").write_text(yaml.safe_dump([1]))
    with pytest.raises(RecipeError, match="mapping of keys, got list"):
        load_recipe(tmp_path / "list.yml")
