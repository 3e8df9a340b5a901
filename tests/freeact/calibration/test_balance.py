"""A few rows far louder than the rest of their type decide neither its mean, nor the codes, nor what a bias takes back."""

import pytest
import torch
from torch import nn

from optimum_freeact.api import quantize
from optimum_freeact.calibration.closed_form import GroupFit
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.surgery import replace_group
from optimum_freeact.moments import Moments
from optimum_freeact.type_state import TypeState
from tests.helpers.quantized import distance, logits, quantized, settings
from tests.helpers.tiny_models import tiny


N, D, LOUD = 512, 32, 1000.0


def errors(rows: torch.Tensor, loudest: float | None, preset: str = "rtn") -> tuple[float, float]:
    """Of the quiet rows' outputs, over their size, after a fit to all rows: of their mean, and of each."""
    torch.manual_seed(0)
    block = nn.Module()
    block.add_module("q_proj", nn.Linear(D, 16, bias=False))
    linear = block.q_proj
    config = FreeActConfig(
        preset=preset, centring="per_type", token_types=["text"], activation_bits=4, low_rank=0, loudness_limit=loudest
    )
    source, targets = replace_group(block, ["q_proj"], config, TypeState(), torch.device("cpu"))
    moments = Moments(D, 1, torch.device("cpu"), limit=loudest)
    moments.update(rows, torch.zeros(N, dtype=torch.long))
    fit = GroupFit(["q_proj"], [linear], source, targets, moments, config)
    fit.closed_form(torch.Generator().manual_seed(0))
    quiet = rows[rows.norm(dim=1) < LOUD]
    with torch.no_grad():
        wanted = linear(quiet)
        lost = targets[0](quiet) - wanted
    size = float(wanted.norm(dim=1).mean())
    return float(lost.mean(0).norm()) / size, float(lost.norm(dim=1).mean()) / size


def rows_with(loud: int) -> torch.Tensor:
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    rows[:loud] = LOUD * (rows[:loud] + 3)
    return rows[torch.randperm(N, generator=torch.Generator().manual_seed(2))]


@pytest.mark.parametrize("preset", ["rtn", "freeact-fast"])
def test_quiet_tokens_survive_loud_ones_of_their_type(preset):
    mean, each = errors(rows_with(8), 2.0, preset)
    ruined_mean, ruined = errors(rows_with(8), None, preset)
    clean_mean, clean = errors(rows_with(0), 2.0, preset)
    assert ruined_mean > 0.3
    assert ruined > 5 * clean  # what it would be without
    assert mean < 0.1
    assert each < 1.5 * clean
    assert clean_mean < 0.05


def test_rows_alike_are_all_that_counts_where_no_row_is_loud():
    rows = rows_with(0)
    assert errors(rows, 1e6) == pytest.approx(errors(rows, None), rel=1e-4)


def test_the_limit_reaches_calibration():
    plain, high, low = (logits(quantized(loudness_limit=limit)) for limit in (None, 1e9, 0.5))
    assert distance(high, plain) < 1e-3
    assert distance(low, plain) > 1e-3


@pytest.mark.parametrize(
    ("types", "rules", "limit"),
    [
        (["text", "sink"], None, None),
        (["text", "sink", "image"], {"image": [5]}, 2.0),
        (["text", "sink", "text.1"], {"text.1": {"cluster": 1}}, None),
    ],
    ids=["text", "image", "clusters"],
)
def test_auto_is_for_types_that_are_told(types, rules, limit):
    fields = {"token_types": types, "type_rules": rules}
    assert FreeActConfig(loudness_limit="auto", **fields).loudest == limit
    assert FreeActConfig(loudness_limit=3.0, **fields).loudest == 3.0
    assert FreeActConfig(**fields).loudest == limit
    assert FreeActConfig("quarot", **fields).loudest is None
    assert FreeActConfig(loudness_limit=None, **fields).loudest is None


def test_the_default_limits_models_that_have_such_tokens_whether_or_not_they_are_a_type():
    """Text and sink alone put a picture's loud tokens into the mean of text."""
    found = {}
    for mask_token_id in (None, 99):
        model = tiny("llama")
        if mask_token_id is not None:
            model.config.mask_token_id = mask_token_id
        model = quantize(model, settings(token_types=["text", "sink"]))
        found[mask_token_id] = model.hf_quantizer.quantization_config
    assert [config.token_types for config in found.values()] == [["text", "sink"]] * 2
    assert found[None].loudest is None
    assert found[99].loudest == 2.0
    assert found[99].to_dict()["loudness_limit"] == 2.0


def quiet_error(fit_alone: bool) -> float:
    """Of a type of which most rows are loud about a mean, and the others quiet: what the quiet ones lose, relative to their outputs."""
    torch.manual_seed(1)
    block = nn.Module()
    block.add_module("q_proj", nn.Linear(D, 16, bias=False))
    linear = block.q_proj
    config = FreeActConfig(
        preset="freeact-fast", token_types=["text"], activation_bits=4, low_rank=0, loudness_limit=2.0
    )
    direction = torch.randn(D)
    loud = LOUD * (direction + 0.3 * torch.randn(3 * N // 4, D))
    rows = torch.cat([loud, torch.randn(N // 4, D)])[torch.randperm(N)]
    source, targets = replace_group(block, ["q_proj"], config, TypeState(), torch.device("cpu"))
    moments = Moments(D, 1, torch.device("cpu"), limit=2.0)
    moments.update(rows, torch.zeros(N, dtype=torch.long))
    fit = GroupFit(["q_proj"], [linear], source, targets, moments, config)
    generator = torch.Generator().manual_seed(0)
    fit.closed_form(generator) if fit_alone else fit._fit_about_centres(generator)
    quiet = rows[rows.norm(dim=1) < LOUD]
    with torch.no_grad():
        source.prepare(), targets[0].prepare()
        found, exact = targets[0](quiet), linear(quiet)
    return float(((found - exact).square().sum(1) / exact.square().sum(1)).median())


def test_no_mean_is_subtracted_that_a_loud_majority_decides():
    assert quiet_error(fit_alone=False) > 10
    assert quiet_error(fit_alone=True) < 0.1
