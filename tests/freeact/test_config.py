"""Every argument documented and checked; JSON both ways; messages that name value, allowed values and remedy."""

import copy
import itertools
import json
import re

import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig

from optimum_freeact.config import FreeActConfig
from optimum_freeact.config_fields import CHOICES, DEFAULTS, FORMAT_VERSION, RECORDED, RUNTIME
from optimum_freeact.presets import PRESETS


ARGUMENTS = {"preset", *DEFAULTS, *(name for preset in PRESETS.values() for name in preset), *RUNTIME}


def documented() -> dict[str, str]:
    """Argument -> its line, from the class's docstring."""
    text = FreeActConfig.__doc__.partition("Args:")[2].partition("Raises:")[0]
    entries = re.findall(r"^        ([a-z_]+(?:, [a-z_]+)*) \((.*)$", text, re.MULTILINE)
    found = {name: line for names, line in entries for name in names.split(", ")}
    for entry in re.findall(r"\), ([a-z_]+) \((.*?)\)", text):  # a second argument on the same line
        found[entry[0]] = entry[1]
    return found


def test_every_argument_is_documented_and_every_documented_one_exists():
    assert set(documented()) == ARGUMENTS


def test_documented_defaults_are_the_defaults():
    config = FreeActConfig()
    said = {name: re.search(r"defaults to `?([^`):]+)`?", line) for name, line in documented().items()}
    for name, match in said.items():
        if match:
            assert match.group(1).strip('"') == str(getattr(config, name)) or float(match.group(1)) == getattr(
                config, name
            )
    assert sum(match is not None for match in said.values()) >= 12


def test_presets_fill_the_same_arguments_and_yield_to_the_caller():
    assert len({frozenset({*DEFAULTS, *preset}) for preset in PRESETS.values()}) == 1
    for name in PRESETS:
        config = FreeActConfig(name, centring="shared")
        assert (config.preset, config.centring) == (name, "shared")
    assert FreeActConfig().preset == "freeact"


@pytest.mark.parametrize("preset", PRESETS)
def test_json_both_ways(preset):
    config = FreeActConfig(preset, kv_bits=4, dataset=["some text"], tokenizer=object(), resume_dir="folder")
    stored = json.loads(config.to_json_string(use_diff=False))
    assert not set(stored) & set(RUNTIME)
    again = AutoQuantizationConfig.from_dict(stored)
    assert type(again) is FreeActConfig
    assert again.to_dict() == config.to_dict() == dict(iter(again))
    assert "some text" not in repr(config)


def test_copies_share_the_data_and_nothing_else():
    config = FreeActConfig(dataset=torch.zeros(1, 4, dtype=torch.long), tokenizer=object())
    clone = copy.deepcopy(config)
    assert clone.dataset is config.dataset
    assert clone.tokenizer is config.tokenizer
    assert clone.token_types == config.token_types
    assert clone.token_types is not config.token_types
    clone.token_types.append("x")
    assert FreeActConfig().token_types == ["text", "sink", "auto"]


WRONG = [
    *((name, value) for name in CHOICES for value in ("nonsense", None, 3, 4.0, [4])),
    *((name, value) for name in ("weight_bits", "activation_bits", "kv_bits") for value in (2, 5, 32, "4", True)),
    *((name, value) for name in ("n_samples", "seq_len", "batch_size", "epochs") for value in (0, -1, 2.5, "8", True)),
    *((name, value) for name in ("activation_clip", "weight_clip") for value in (0, 1.5, -1, "x", True, None)),
    *((name, value) for name in ("damping", "learning_rate", "smooth_alpha") for value in (0, -1, "x", float("nan"))),
    ("low_rank", -1),
    ("seed", -1),
    ("weight_group_size", 1),
    ("weight_group_size", 32.0),
    ("activation_group_size", 1),
    ("activation_group_size", "32"),
    ("token_types", ["sink"]),
    ("token_types", ["text", "nonsense"]),
    ("token_types", "text"),
    ("modules_to_not_convert", "lm_head"),
    ("modules_to_not_convert", [1]),
    ("preset", "fastest"),
    ("preset", ["rtn"]),
    ("format_version", "one"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda item: repr(item))
def test_a_wrong_value_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError) as caught:
        FreeActConfig(**{name: value})
    message = str(caught.value)
    assert name in message
    assert repr(value) in message
    assert "must be" in message
    for allowed in CHOICES.get(name, ()):
        assert repr(allowed) in message


def test_unknown_arguments_are_refused_and_the_known_ones_listed():
    with pytest.raises(TypeError, match=r"\['weight_bit'\].*'weight_bits'"):
        FreeActConfig(weight_bit=4)


def test_contradictions_are_refused():
    for transform in ("none", "orthogonal"):
        with pytest.raises(ValueError, match="kronecker.*hadamard"):
            FreeActConfig(calibration="learned", learned_part="maps", transform=transform)


def test_float_scales_of_groups_from_format_one_are_refused_and_the_rest_of_it_is_read():
    with pytest.raises(ValueError, match="format version 1 with weight_group_size set.*again"):
        FreeActConfig(format_version=1, weight_group_size=32)
    assert FreeActConfig(format_version=1, weight_group_size=None).format_version == 1


def test_outputs_are_learned_behind_rounded_weights_only():
    for changes in ({"weight_bits": 16}, {"learned_start": "random"}):
        with pytest.raises(ValueError, match="learned_part='outputs' tunes"):
            FreeActConfig(calibration="learned", **changes)


@pytest.mark.parametrize("value", [0, 1, -0.1, True, "much"])
def test_a_budget_is_a_share(value):
    with pytest.raises(ValueError, match="low_rank_budget must be"):
        FreeActConfig(low_rank_budget=value)


def test_a_newer_format_is_refused_even_with_fields_unknown_here():
    with pytest.raises(ValueError, match=f"version {FORMAT_VERSION + 1}.*up to {FORMAT_VERSION}.*newer hf-concord"):
        FreeActConfig(format_version=FORMAT_VERSION + 1, wavelets=True)


def test_scheme_names_the_bits():
    assert FreeActConfig().scheme == "W4A4"
    assert FreeActConfig(weight_bits=8, activation_bits=16, kv_bits=4).scheme == "W8A16KV4"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_every_number_of_bits(preset):
    for weight, activation, cache in itertools.product((4, 8, 16), repeat=3):
        config = FreeActConfig(preset, weight_bits=weight, activation_bits=activation, kv_bits=cache)
        assert config.scheme == f"W{weight}A{activation}" + (f"KV{cache}" if cache < 16 else "")
        assert AutoQuantizationConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_recorded_fields_are_no_arguments_of_the_user():
    assert not set(RECORDED) & ARGUMENTS
