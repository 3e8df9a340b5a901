"""What rounding takes from a type's mean output is given back by its bias; whose rows decide how much."""

import pytest
import torch
from torch import nn

from optimum_freeact.calibration import closed_form
from optimum_freeact.calibration.closed_form import GroupFit
from optimum_freeact.config import FreeActConfig
from optimum_freeact.modules.surgery import replace_group
from optimum_freeact.moments import Moments
from optimum_freeact.type_state import TypeState


N, D, LOUD = 512, 32, 1000.0


def mean_error(rows: torch.Tensor, by_energy: bool, monkeypatch) -> float:
    """Of the quiet rows' outputs, over their size, after a fit to all rows."""
    monkeypatch.setattr(closed_form, "BALANCE_BY_ENERGY", by_energy)
    torch.manual_seed(0)
    block = nn.Module()
    block.add_module("q_proj", nn.Linear(D, 16, bias=False))
    linear = block.q_proj
    config = FreeActConfig(preset="rtn", centring="per_type", token_types=["text"], activation_bits=4)
    source, targets = replace_group(block, ["q_proj"], config, TypeState(), torch.device("cpu"))
    moments = Moments(D, 1, torch.device("cpu"))
    moments.update(rows, torch.zeros(N, dtype=torch.long))
    fit = GroupFit(["q_proj"], [linear], source, targets, moments, config)
    fit.closed_form(torch.Generator().manual_seed(0))
    quiet = rows[rows.norm(dim=1) < LOUD]
    with torch.no_grad():
        wanted = linear(quiet)
        return float((targets[0](quiet) - wanted).mean(0).norm() / wanted.norm(dim=1).mean())


def rows_with(loud: int) -> torch.Tensor:
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    rows[:loud] = LOUD * (rows[:loud] + 3)
    return rows[torch.randperm(N, generator=torch.Generator().manual_seed(2))]


@pytest.mark.parametrize("by_energy", [True, False])
def test_the_mean_error_of_rows_alike_is_taken_back(by_energy, monkeypatch):
    assert mean_error(rows_with(0), by_energy, monkeypatch) < 0.03  # a sample of rows decides


def test_a_few_loud_rows_decide_only_where_all_count_alike(monkeypatch):
    loud, quiet = (mean_error(rows_with(8), by_energy, monkeypatch) for by_energy in (False, True))
    assert loud > 1
    assert quiet < 0.5
