"""Transport problems whose answer is known: permutations, duplicates, symmetry, POT's own answer."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mergekit_ot.costs import centred_gram, cka, correlation, correlation_cost, require_finite, standardise
from mergekit_ot.sinkhorn import log_sinkhorn
from mergekit_ot.solvers import NotConvergedError, auto_reg, marginal_error, solve_plan


def _rows(n_rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_rows, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", ["hard", "entropic"])
def test_a_permuted_copy_is_found(solver):
    rows = _rows(400, 24)
    permutation = torch.randperm(24)
    plan = solve_plan(correlation_cost(correlation(rows, rows[:, permutation])), solver=solver, reg=0.02)
    assert torch.equal(permutation[plan.to_target.argmax(dim=1)], torch.arange(24))
    assert plan.evidence.converged
    assert marginal_error(plan.coupling) < 1e-4


def test_duplicated_channels_share_the_mass_in_both_directions():
    rows = _rows(400, 10)
    donor = torch.cat([rows, rows], dim=1)
    plan = solve_plan(correlation_cost(correlation(rows, donor)))
    eye = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(plan.to_target, torch.cat([eye, eye], dim=1) / 2, atol=1e-12, rtol=0)
    torch.testing.assert_close(plan.to_donor, torch.cat([eye, eye]), atol=1e-12, rtol=0)
    assert plan.evidence.solver == "emd"


def test_hard_is_the_assignment_and_is_symmetric():
    cost = torch.rand(17, 17, dtype=torch.float64)
    plan = solve_plan(cost)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert np.allclose(plan.evidence.cost, cost.numpy()[rows, columns].mean())
    assert torch.equal(plan.coupling.T, solve_plan(cost.T).coupling)


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_torch_loop_agrees_with_pot(shape):
    cost = torch.rand(*shape, dtype=torch.float64)
    ours, sweeps, error = log_sinkhorn(cost, 0.05, tolerance=1e-9, max_iterations=5000)
    pot = solve_plan(cost, solver="entropic", reg=0.05, max_iterations=5000).coupling
    assert error < 1e-9
    assert sweeps < 5000
    assert (ours - pot).abs().max() < 1e-6


def test_without_pot_the_answers_are_the_same(monkeypatch):
    import mergekit_ot.solvers as solvers

    cost = torch.rand(8, 12, dtype=torch.float64)
    exact, soft = solve_plan(cost), solve_plan(cost, solver="entropic", reg=0.1)
    monkeypatch.setattr(solvers, "has_pot", lambda: False)
    torch.testing.assert_close(solve_plan(cost).coupling, exact.coupling, atol=1e-9, rtol=0)
    torch.testing.assert_close(solve_plan(cost, solver="entropic", reg=0.1).coupling, soft.coupling, atol=1e-5, rtol=0)
    with pytest.raises(ModuleNotFoundError, match="pip install POT"):
        solve_plan(torch.rand(200, 300))


def test_scaling_cost_and_reg_together_changes_nothing():
    cost = torch.rand(9, 13, dtype=torch.float64)
    small, _, _ = log_sinkhorn(cost, 0.1, tolerance=1e-10)
    large, _, _ = log_sinkhorn(7 * cost, 0.7, tolerance=1e-10)
    torch.testing.assert_close(small, large, atol=1e-10, rtol=0)


def test_unbalanced_leaves_a_channel_without_a_partner_nearly_empty():
    rows = _rows(500, 8)
    donor = torch.cat([rows, _rows(500, 4, seed=9)], dim=1)
    cost = correlation_cost(correlation(rows, donor))
    mass = solve_plan(cost, solver="unbalanced", reg=0.05, marginal_penalty=0.1).coupling.sum(dim=0)
    assert mass[8:].max() < 0.1 * mass[:8].min()


def test_a_plan_that_did_not_converge_is_refused_with_the_way_out():
    cost = torch.rand(30, 40, dtype=torch.float64)
    with pytest.raises(NotConvergedError, match="raise reg.*solver: hard"):
        solve_plan(cost, solver="entropic", reg=0.001, max_iterations=3, name="layer 3 neurons")
    plan = solve_plan(cost, solver="entropic", reg=0.001, max_iterations=3, allow_not_converged=True)
    assert not plan.evidence.converged
    assert plan.evidence.marginal_error > 1e-3


def test_auto_reg_keeps_the_self_match():
    easy = correlation(_rows(4000, 20), _rows(4000, 20))
    assert auto_reg(easy) == 0.1
    shared = _rows(2000, 1) + 0.2 * _rows(2000, 20, seed=3)
    hard = correlation(shared, shared)
    assert auto_reg(hard) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "greedy"}, "solver must be one of"),
        ({"solver": "entropic", "reg": 0.0}, "reg must be a positive number, got 0.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_plan(torch.rand(3, 3), **arguments)
    with pytest.raises(ValueError, match="not finite"):
        solve_plan(torch.full((2, 2), float("nan")))


def test_constant_channels_match_nothing_and_non_finite_ones_are_named():
    rows = _rows(100, 5)
    rows[:, 2] = 3.0
    assert torch.equal(standardise(rows)[:, 2], torch.zeros(100, dtype=torch.float64))
    assert correlation(rows, rows)[2].abs().max() == 0
    rows[7, 4] = float("inf")
    with pytest.raises(ValueError, match=r"layer 0 h.*channels \[4\]"):
        require_finite(rows, "layer 0 h")


def test_cka_ignores_rotation_and_scale_and_is_zero_without_variation():
    rows = _rows(60, 12)
    rotation = torch.linalg.qr(_rows(12, 12, seed=4)).Q
    assert abs(cka(rows, 3.0 * rows @ rotation) - 1.0) < 1e-10
    assert cka(rows, _rows(60, 12, seed=5)) < 0.5
    assert centred_gram(torch.zeros(10, 3)).abs().max() == 0
