"""Transport in closed form, float64: permutations, duplicates, rotations, and the size of the released arithmetic."""

import pytest
import torch

from mergekit_ot.costs import correlation, correlation_cost
from mergekit_ot.maps import DenseMap, SparseMap, one_hot, sparsify
from mergekit_ot.plan import TransportPlan
from mergekit_ot.solvers import solve_plan
from mergekit_ot.transport import (
    interpolate,
    transport_as_released,
    transport_bias,
    transport_weight,
    transport_with_plans,
)


def _plan(target: torch.Tensor, donor: torch.Tensor) -> TransportPlan:
    return solve_plan(correlation_cost(correlation(target, donor)))


def _layer(n_out: int = 9, n_in: int = 7):
    weight = torch.randn(n_out, n_in, dtype=torch.float64) / n_in**0.5
    x = torch.randn(300, n_in, dtype=torch.float64)
    return weight, x, x @ weight.T


def test_permuted_donor_comes_back_exactly():
    weight, x, y = _layer()
    out, into = torch.randperm(9), torch.randperm(7)
    donor = weight[out][:, into]
    back = transport_with_plans(donor, _plan(y, y[:, out]), _plan(x, x[:, into]))
    torch.testing.assert_close(back, weight, atol=1e-14, rtol=0)


@pytest.mark.parametrize("copies", [2, 3])
def test_widened_donor_comes_back_exactly(copies):
    weight, x, y = _layer()
    donor = weight.repeat(copies, copies) / copies
    back = transport_with_plans(donor, _plan(y, y.repeat(1, copies)), _plan(x, x.repeat(1, copies)))
    torch.testing.assert_close(back, weight, atol=1e-13, rtol=0)


def test_narrowed_donor_acts_on_the_wide_target_exactly():
    weight, x, y = _layer()
    wide_x, wide_y = x.repeat(1, 2), y.repeat(1, 2)
    back = transport_with_plans(weight, _plan(wide_y, y), _plan(wide_x, x))
    torch.testing.assert_close(wide_x @ back.T, wide_y, atol=1e-12, rtol=0)


def test_released_arithmetic_is_smaller_by_both_widths():
    weight, x, y = _layer()
    out_plan, in_plan = _plan(y, y), _plan(x, x)
    ratio = (
        transport_with_plans(weight, out_plan, in_plan).norm()
        / transport_as_released(weight, out_plan, in_plan).norm()
    )
    assert abs(ratio - 9 * 7) < 1e-9


def test_bias_rides_on_the_output_map():
    bias = torch.arange(5, dtype=torch.float64)
    assert torch.equal(
        transport_bias(bias, one_hot(torch.tensor([4, 0, 2]), 5)), torch.tensor([4.0, 0.0, 2.0]).double()
    )


def test_sparse_and_dense_maps_are_one_matrix():
    dense = torch.rand(6, 11, dtype=torch.float64)
    dense[dense < 0.7] = 0.0
    dense[:, 0] += 0.1
    dense /= dense.sum(dim=1, keepdim=True)
    sparse, lost = sparsify(dense, max_picks=11)
    assert lost < 1e-12
    left, right = torch.randn(11, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(sparse.left(left), dense @ left)
    torch.testing.assert_close(sparse.right(right), right @ dense)
    torch.testing.assert_close(sparse.dense(left), dense)


def test_sparsify_says_what_it_lost_and_keeps_the_sum():
    sparse, lost = sparsify(torch.tensor([[0.5, 0.3, 0.2]]), max_picks=2)
    assert abs(lost - 0.2) < 1e-6
    torch.testing.assert_close(sparse.weight.sum(), torch.tensor(1.0))
    assert isinstance(sparse, SparseMap)


def test_maps_that_do_not_fit_are_named_with_all_shapes():
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(5, 2\).*\(4, 6\)"):
        transport_weight(torch.zeros(4, 6), DenseMap(torch.zeros(3, 4)), DenseMap(torch.zeros(5, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_alpha_zero_is_the_target_itself(dtype):
    target = torch.randn(4, 4).to(dtype)
    assert interpolate(target, torch.randn(4, 4), 0.0) is target
    half = interpolate(target, torch.zeros(4, 4), 0.5)
    assert half.dtype == dtype
    torch.testing.assert_close(half, target / 2)


def test_a_coupling_must_be_a_coupling():
    plan = solve_plan(torch.rand(3, 3))
    with pytest.raises(ValueError, match="non-negative"):
        TransportPlan(-plan.coupling, plan.evidence)
