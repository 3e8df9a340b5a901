"""GPTQ: rounding to nearest where inputs are uncorrelated, better where they are not, and it never gives up."""

import pytest
import torch

from optimum_freeact.rounding.gptq import gptq, inverse_factor, refit_groups
from optimum_freeact.rounding.rtn import round_to_nearest


OUT, D = 16, 64


def weight():
    return torch.randn(OUT, D) / D**0.5


def correlated(rank=D, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, rank, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(rank, D, dtype=torch.float64, generator=generator)
    return x.mT @ x / 500


def restored(rounded):
    return rounded.values.flatten(1).double()


def error(rounded, original, moments):
    gap = restored(rounded) - original.double()
    return float((gap @ moments * gap).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [D, 16])
@pytest.mark.parametrize("clip", [None, 0.9])
def test_uncorrelated_inputs_give_round_to_nearest(bits, size, clip):
    original = weight()
    got = gptq(original, torch.eye(D, dtype=torch.float64), bits, size, clip=clip)
    expected = round_to_nearest(original, bits, size, clip)
    assert torch.equal(got.steps, expected.steps)
    assert torch.equal(got.codes, expected.codes)


@pytest.mark.parametrize("size", [D, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_correlated_inputs_lose_less(bits, size):
    original, moments = weight(), correlated()
    nearest, second_order = round_to_nearest(original, bits, size), gptq(original, moments, bits, size)
    assert error(second_order, original, moments) < 0.8 * error(nearest, original, moments)
    assert second_order.codes.shape == (OUT, D // size, size)
    assert second_order.codes.abs().max() <= 2 ** (bits - 1)
    assert torch.equal(second_order.codes, second_order.codes.round())


@pytest.mark.parametrize("wide", [200, 300])
def test_halving_changes_nothing(wide):
    """More columns than a leaf: compared with updating all columns after each."""
    from optimum_freeact.rounding import gptq as module

    original = torch.randn(4, wide) / wide**0.5
    x = torch.randn(900, wide, dtype=torch.float64) @ torch.randn(wide, wide, dtype=torch.float64)
    moments, before = x.mT @ x / 900, module.LEAF
    halved = gptq(original, moments, 4, wide)
    try:
        module.LEAF = wide
        whole = gptq(original, moments, 4, wide)
    finally:
        module.LEAF = before
    assert (halved.codes != whole.codes).float().mean() < 0.01  # float32 ties only
    assert error(halved, original, moments) == pytest.approx(error(whole, original, moments), rel=0.01)


@pytest.mark.parametrize("size", [D, 16])
def test_each_pass_of_descent_loses_less_and_ends_where_no_code_can_be_better(size):
    original, moments = weight(), correlated()
    errors = [error(gptq(original, moments, 4, size, damping=1e-9, passes=n), original, moments) for n in range(4)]
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    best = gptq(original, moments, 4, size, damping=1e-9, passes=30)
    least = error(best, original, moments)
    for row, column in ((0, 0), (3, 17), (15, 63)):
        for step in (-1, 1):
            other = best.codes.clone()
            other.flatten(1)[row, column] += step
            if other.abs().max() <= 7:
                assert error(best._replace(codes=other), original, moments) >= least * (1 - 1e-6)


def test_descent_in_blocks_changes_nothing():
    """More columns than a block: the codes of a pass that updates every column after each."""
    from optimum_freeact.rounding import gptq as module

    wide = 200
    original = torch.randn(4, wide) / wide**0.5
    x = torch.randn(900, wide, dtype=torch.float64) @ torch.randn(wide, wide, dtype=torch.float64)
    moments, before = x.mT @ x / 900, module.BLOCK
    blocked = gptq(original, moments, 4, wide, passes=2)
    try:
        module.BLOCK = 1
        single = gptq(original, moments, 4, wide, passes=2)
    finally:
        module.BLOCK = before
    assert (blocked.codes != single.codes).float().mean() < 0.02  # float32 ties only
    assert error(blocked, original, moments) == pytest.approx(error(single, original, moments), rel=0.01)


@pytest.mark.parametrize("rule", [round_to_nearest, lambda w, *a: gptq(w, correlated(), *a)])
def test_group_scales_are_bytes_times_one_number_a_row(rule):
    """Also where groups of a row are far apart, all zero, or the whole row is."""
    original = weight()
    original[0, :16] *= 1000
    original[1, :16] = 0
    original[2] = 0
    got = rule(original, 4, 16)
    assert got.scale.shape == (OUT, 1, 1)
    assert got.group_scale.shape == (OUT, D // 16, 1)
    assert torch.equal(got.group_scale, got.group_scale.round())
    assert got.group_scale.abs().min() >= 1
    assert (got.group_scale[:2].abs().amax(1) == 127).all()
    assert got.group_scale[3:].abs().amax(1).eq(127).all()
    torch.testing.assert_close(got.values, got.codes * got.scale * got.group_scale)
    assert restored(got)[1, :16].abs().max() < 0.01 * original[1].abs().max()  # GPTQ may use it for others' errors
    assert restored(got)[2].abs().max() == 0
    gap = (restored(got) - original).abs().unflatten(-1, (-1, 16)).amax(-1)
    assert (gap[3:] <= 1.1 * original[3:].abs().unflatten(-1, (-1, 16)).amax(-1)).all()


@pytest.mark.parametrize("by_energy", [True, False])
def test_scales_fitted_to_the_codes_lose_less_than_another_pass(by_energy):
    moments, original = correlated(), weight()
    original[0, :16] = 0  # a group without a weight keeps its scale
    more = gptq(original, moments, 4, 16, passes=3, by_energy=by_energy)
    fitted = gptq(original, moments, 4, 16, passes=2, by_energy=by_energy, refit=True)
    assert error(fitted, original, moments) < error(more, original, moments)
    assert fitted.group_scale.abs().max() <= 127
    assert (fitted.group_scale.abs() >= 1).all()
    assert torch.equal(fitted.group_scale, fitted.group_scale.round())
    assert torch.equal(fitted.group_scale.sign(), more.group_scale.sign())
    whole = gptq(original, moments, 4, D, passes=2, by_energy=by_energy, refit=True)  # one group: nothing to fit
    assert torch.equal(whole.codes, gptq(original, moments, 4, D, passes=2, by_energy=by_energy).codes)


def test_a_refitted_group_has_the_best_of_all_bytes():
    moments, original = correlated(), weight()
    plain = gptq(original, moments, 4, 16, passes=2)
    codes, group_of = plain.codes.flatten(1).mT, torch.arange(D) // 16
    found = refit_groups(codes, original.mT, plain.scale, plain.group_scale, moments.float(), group_of)
    last = D // 16 - 1  # fitted last: best for the others as they are
    for byte in range(1, 128):
        other = found.clone()
        other[:, last] = byte * found[:, last].sign()
        gap = (plain.codes * plain.scale * torch.stack((found, other))).flatten(2).double() - original.double()
        fitted, changed = ((each @ moments) * each for each in gap)
        assert (fitted.sum(1) <= changed.sum(1) * (1 + 1e-5)).all()


def test_the_lowest_code_is_on_the_side_of_the_extreme_weight():
    original = torch.full((2, 16), 0.1)
    original[0, 3], original[1, 5] = 1.0, -1.0
    got = round_to_nearest(original, 4, 16)
    assert got.codes[0, 0, 3] == got.codes[1, 0, 5] == -8
    assert got.steps.flatten().sign().tolist() == [-1.0, 1.0]


def test_finer_groups_lose_less():
    original = weight()
    errors = [error(round_to_nearest(original, 4, size), original, torch.eye(D).double()) for size in (D, 32, 16, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


SINGULAR = {
    "zero": lambda: torch.zeros(D, D, dtype=torch.float64),
    "rank one": lambda: correlated(1),
    "rank three": lambda: correlated(3),
    "dead channels": lambda: torch.diag((torch.arange(D) % 2).double()),
    "slightly negative": lambda: correlated(3) - 1e-9 * torch.eye(D, dtype=torch.float64),
    "negative": lambda: correlated(3) - 0.5 * torch.eye(D, dtype=torch.float64),
    "tiny": lambda: 1e-30 * correlated(),
    "huge": lambda: 1e30 * correlated(2),
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("damping", [0.01, 1e-12])
def test_damping_never_fails(kind, damping):
    moments = SINGULAR[kind]()
    upper, added = inverse_factor(moments, damping)
    assert added > 0
    assert torch.equal(upper, upper.triu())
    assert torch.isfinite(upper).all()
    got = gptq(weight(), moments, 4, D, damping)
    assert torch.isfinite(restored(got)).all()


def test_factor_is_that_of_the_inverse():
    moments = correlated()
    upper, added = inverse_factor(moments, 0.01)
    damped = moments + added * torch.eye(D)
    assert float(added) == pytest.approx(0.01 * float(moments.diagonal().mean()))
    torch.testing.assert_close(upper.mT @ upper @ damped, torch.eye(D, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value):
    moments = correlated()
    moments[3, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight(), moments, 4, D)
