"""Options are checked when they are given, with what was got and what is allowed."""

import re
from dataclasses import fields

import pytest

from trl_mlc.arguments import MLCArguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlc_weight": -0.1}, "mlc_weight must be at least 0, got -0.1"),
        ({"mlc_temperature": 0.0}, "mlc_temperature must be positive, got 0.0"),
        ({"mlc_repulsion_temperature": -1.0}, "mlc_repulsion_temperature must be positive, got -1.0"),
        ({"mlc_center": "all"}, "'none', 'language', 'common'.*got 'all'"),
        ({"mlc_layer": "middle"}, "integer or 'auto', got 'middle'"),
        ({"mlc_pooling": "cls"}, "'last', 'mean'.*got 'cls'"),
        ({"mlc_objective": "svd"}, "'rank1', 'cosine'.*got 'svd'"),
        ({"mlc_languages_per_step": 1}, "at least 2, got 1"),
        ({"mlc_every": 0}, "at least 1, got 0"),
        ({"mlc_extractor_dim": 0, "mlc_extractor_lr": 1e-4}, "nothing to train"),
        ({"mlc_anchor": " "}, "must name the language of the prompt column, got ' '"),
        ({"mlc_center_momentum": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MLCArguments(**options)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="mlc_wieght"):
        MLCArguments(mlc_wieght=1.0)


@pytest.mark.parametrize(("given", "kept"), [("auto", "auto"), ("15", 15), (-1, -1), (0, 0)])
def test_layer_from_the_command_line_becomes_a_number(given, kept):
    assert MLCArguments(mlc_layer=given).mlc_layer == kept


@pytest.mark.parametrize(("given", "kept"), [(True, "language"), ("False", "none"), ("common", "common")])
def test_centring_may_be_said_with_true(given, kept):
    assert MLCArguments(mlc_center=given).mlc_center == kept


def test_every_option_is_documented_with_its_default():
    for option in fields(MLCArguments):
        entry = re.search(rf"\n        {option.name} \((.*?)\):\n", MLCArguments.__doc__)
        assert entry, f"{option.name} is missing from the docstring"
        shown = {None: "*optional*", "auto": '`"auto"`'}.get(option.default)
        if shown is None:
            shown = f'`"{option.default}"`' if isinstance(option.default, str) else str(option.default)
        assert shown in entry.group(1), f"{option.name}: docstring says {entry.group(1)}, default is {option.default}"
        assert option.metadata["help"]
