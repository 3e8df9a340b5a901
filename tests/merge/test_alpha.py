"""What an alpha setting means for a tensor is what mergekit makes of it; filters that fit nothing are refused."""

import pytest
from mergekit.config import MergeConfiguration, evaluate_setting

from mergekit_ot.alpha import alpha_at, alpha_ranges, unmatched_filters
from mergekit_ot.pipeline import check_recipe, plan_recipe
from mergekit_ot.recipe import RecipeError, load_recipe
from tests.merge.test_pipeline import pair, write_recipe


NAMES = [f"model.layers.{i}.{part}_proj.weight" for i in range(4) for part in ("self_attn.q", "mlp.up", "mlp.down")]
SETTINGS = [
    0.3,
    "5e-2",
    [0.0, 0.2],
    [0.1, 0.5, 0.2],
    {"filter": "mlp", "value": 0.4},
    [{"filter": "mlp", "value": 0.05}, {"value": [0.0, 0.2]}],
    [{"filter": "up", "value": [0.3, 0.1]}, {"filter": "*", "value": 0.2}],
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_alpha_is_what_mergekit_makes_of_it(setting):
    recipe = {"merge_method": "transport", "models": [{"model": "a"}], "parameters": {"alpha": setting}}
    parsed = MergeConfiguration.model_validate(recipe).parameters["alpha"]
    for name in NAMES:
        for depth in (0.0, 0.2, 0.5, 0.9, 1.0):
            found = evaluate_setting(name, parsed, depth, validate=float)
            assert alpha_at(setting, name, depth) == pytest.approx(0.1 if found is None else found, abs=1e-12)


def test_ranges_and_filters():
    assert alpha_ranges(SETTINGS[5], NAMES, 4) == {"attn": (0.0, 0.2), "mlp": (0.05, 0.05)}
    assert alpha_ranges(SETTINGS[4], NAMES, 4) == {"attn": (0.1, 0.1), "mlp": (0.4, 0.4)}
    assert unmatched_filters(SETTINGS[6], NAMES) == []
    assert unmatched_filters([{"filter": "mpl", "value": 0.5}, {"value": 0.1}], NAMES) == ["mpl"]
    assert unmatched_filters(0.5, NAMES) == []


def test_a_filter_that_fits_no_tensor_is_refused_and_check_says_what_each_block_gets(tmp_path):
    _, target, donor = pair(tmp_path)
    wrong = load_recipe(write_recipe(tmp_path, target, donor, alpha=[{"filter": "mpl", "value": 0.5}]))
    for attempt in (check_recipe, plan_recipe):
        with pytest.raises(RecipeError, match=r"parameters.alpha: no tensor of the target has 'mpl' in its name"):
            attempt(wrong)
    right = load_recipe(write_recipe(tmp_path, target, donor, alpha=[{"filter": "mlp", "value": 0.5}]))
    found = {finding.part: finding.outcome for finding in check_recipe(right)[1]}
    assert found["alpha, before the gate"] == "attn 0.1, mlp 0.5"
