"""The loss on problems whose answer is known."""

import math

import pytest
import torch

from trl_mlc.losses import (
    consistency_loss,
    contrast_loss,
    cross_prompt_cosine,
    pairwise_cosine_loss,
    repulsion_loss,
    singular_values,
    unit_rows,
)


def collinear(m, d=32, flips=0, dtype=torch.float64):
    row = torch.randn(d, dtype=dtype)
    rows = row.repeat(m, 1) * torch.linspace(0.5, 2.0, m, dtype=dtype).unsqueeze(1)
    rows[:flips] *= -1
    return rows.unsqueeze(0)


@pytest.mark.parametrize(("m", "floor"), [(2, 0.00671535), (3, 0.0133859), (5, 0.0265950), (10, 0.0588739)])
@pytest.mark.parametrize("solver", ["gram64", "svd"])
def test_floor_of_collinear_rows_in_the_released_form(m, floor, solver):
    found = consistency_loss(collinear(m), solver=solver)
    assert found.loss.item() == pytest.approx(floor, rel=1e-4)
    assert found.loss.item() == pytest.approx(math.log(1 + (m - 1) * math.exp(-1 / 0.2)), abs=3e-6)
    assert found.energy.item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("m", "floor"), [(2, 0.000848965), (5, 5.57812e-05), (10, 1.22305e-06)])
def test_floor_of_collinear_rows_in_the_printed_form(m, floor):
    assert consistency_loss(collinear(m), sigma_norm="none").loss.item() == pytest.approx(floor, rel=1e-4)


@pytest.mark.parametrize("m", [2, 5, 10])
@pytest.mark.parametrize("sigma_norm", ["top", "none"])
@pytest.mark.parametrize("signed", [False, True])
def test_orthonormal_rows_cost_log_m(m, sigma_norm, signed):
    rows = torch.linalg.qr(torch.randn(32, m, dtype=torch.float64)).Q.T.unsqueeze(0)
    found = consistency_loss(rows, sigma_norm=sigma_norm, signed=signed)
    assert found.loss.item() == pytest.approx(math.log(m), abs=1e-7)
    assert found.energy.item() == pytest.approx(1 / m, abs=1e-9)


@pytest.mark.parametrize(("m", "flips"), [(3, 1), (10, 1), (10, 3), (10, 5)])
def test_flipped_signs_are_seen_only_by_the_signed_loss(m, flips):
    blind = consistency_loss(collinear(m, flips=flips))
    seen = consistency_loss(collinear(m, flips=flips), signed=True)
    expected = math.log(1 + (m - 1) * math.exp(-abs(1 - 2 * flips / m) / 0.2))
    assert blind.loss.item() == pytest.approx(consistency_loss(collinear(m)).loss.item(), abs=1e-7)
    assert seen.loss.item() == pytest.approx(expected, rel=2e-5)
    assert seen.min_cosine.item() == pytest.approx(-1.0, abs=1e-7)


def test_signed_and_unsigned_agree_on_equal_rows():
    rows = collinear(6)
    assert consistency_loss(rows, signed=True).loss.item() == pytest.approx(
        consistency_loss(rows).loss.item(), abs=1e-9
    )


def test_equicorrelated_rows_have_the_known_spectrum():
    m, c = 10, 0.5
    gram = torch.full((m, m), c, dtype=torch.float64).fill_diagonal_(1.0)
    rows = torch.linalg.cholesky(gram).unsqueeze(0)
    found = consistency_loss(rows)
    top, rest = math.sqrt(1 + (m - 1) * c), math.sqrt(1 - c)
    assert torch.allclose(found.singular_values[0], torch.tensor([top] + [rest] * (m - 1), dtype=torch.float64))
    assert found.loss.item() == pytest.approx(0.2413, abs=2e-3)
    assert consistency_loss(rows, sigma_norm="none").loss.item() == pytest.approx(0.0025, abs=2e-4)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("sigma_norm", ["top", "none"])
def test_gradient_matches_finite_differences(signed, sigma_norm):
    rows = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False, True, True]])

    def undivided(x):  # the stop-gradient is part of the definition: hold the divisor fixed instead
        if sigma_norm == "none":
            return consistency_loss(x, mask, signed=signed, sigma_norm="none").loss
        total = 0.0
        for n in range(2):
            tau = 0.2 * fixed[n].item()
            one = consistency_loss(x[n : n + 1], mask[n : n + 1], temperature=tau, signed=signed, sigma_norm="none")
            total = total + one.loss / 2
        return total

    fixed = consistency_loss(rows, mask).singular_values[:, 0]
    assert torch.autograd.gradcheck(undivided, (rows,))
    (ours,) = torch.autograd.grad(consistency_loss(rows, mask, signed=signed, sigma_norm=sigma_norm).loss, rows)
    (other,) = torch.autograd.grad(undivided(rows), rows)
    assert torch.allclose(ours, other, atol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
def test_masked_group_equals_its_dense_subset(signed):
    rows = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 7, [True, False, True, False, True, True, False], [False] * 6 + [True]])
    found = consistency_loss(rows, mask, signed=signed)
    for n in (0, 1):
        dense = consistency_loss(rows[n : n + 1, mask[n]], signed=signed)
        assert found.per_group[n].item() == pytest.approx(dense.loss.item(), abs=1e-12)
        assert found.min_cosine[n].item() == pytest.approx(dense.min_cosine.item(), abs=1e-12)
    assert found.per_group[2].item() == 0.0
    found.loss.backward()
    assert rows.grad[~mask].abs().max() == 0.0
    assert rows.grad[2].abs().max() == 0.0
    assert rows.grad[0].abs().min() > 0.0


def test_invariant_to_rotation_order_and_length():
    rows = torch.randn(2, 5, 12, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    reference = consistency_loss(rows).loss
    assert torch.allclose(consistency_loss(rows @ rotation).loss, reference, atol=1e-12)
    assert torch.allclose(consistency_loss(rows[:, [3, 1, 4, 0, 2]]).loss, reference, atol=1e-12)
    assert torch.allclose(consistency_loss(rows * torch.rand(2, 5, 1, dtype=torch.float64).add(0.1)).loss, reference)


@pytest.mark.parametrize("solver", ["gram64", "svd"])
def test_fewer_features_than_languages(solver):
    found = consistency_loss(torch.randn(2, 6, 3, dtype=torch.float64), solver=solver)
    other = consistency_loss(torch.randn(2, 6, 3), solver=solver)
    assert found.singular_values.shape == (2, 6)
    assert found.singular_values[:, 3:].abs().max() < 2e-6
    assert torch.isfinite(other.loss)


@pytest.mark.parametrize("rows", [torch.ones(1, 4, 8), -torch.ones(1, 4, 8), torch.eye(8)[:4].unsqueeze(0)])
def test_gradients_are_finite_at_degenerate_spectra(rows):
    rows = rows.clone().requires_grad_()
    consistency_loss(rows, signed=True).loss.backward()
    assert torch.isfinite(rows.grad).all()


def test_low_precision_input_is_scored_in_float32():
    rows = torch.randn(4, 10, 512).add(torch.randn(4, 1, 512) * 3)
    exact = consistency_loss(rows.double()).loss
    low = consistency_loss(rows.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = consistency_loss(rows)
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(exact.item(), rel=5e-4)
    assert inside.loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_gram_in_float64_keeps_the_gradient_near_rank_one():
    base = torch.randn(1, 1, 512, dtype=torch.float64)
    rows = base + 1e-2 * torch.randn(1, 8, 512, dtype=torch.float64)

    def gradient(x, solver):
        x = x.clone().requires_grad_()
        consistency_loss(x, solver=solver).loss.backward()
        return x.grad.double()

    exact = gradient(rows, "svd")
    assert (gradient(rows.float(), "gram64") - exact).norm() / exact.norm() < 1e-4


def test_pairwise_cosine_is_one_minus_the_mean_cosine():
    rows = torch.randn(2, 4, 9, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    units = unit_rows(rows, mask)[0]
    expected = 1 - (units[0] @ units[1] + units[0] @ units[2] + units[1] @ units[2]) / 3
    assert pairwise_cosine_loss(rows, mask).item() == pytest.approx(expected.item() / 2, abs=1e-12)


def test_repulsion_is_one_at_collapse_and_between_mean_and_maximum_elsewhere():
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert repulsion_loss(torch.ones(3, 4, 8), mask).item() == pytest.approx(1.0, abs=1e-6)
    rows = torch.randn(3, 4, 8, dtype=torch.float64)
    units = unit_rows(rows, mask)
    between = torch.cat([(units[i] @ units[j].T).flatten() for i in range(3) for j in range(3) if i != j])
    assert between.mean() < repulsion_loss(rows, mask) < between.max()
    assert cross_prompt_cosine(rows, mask).item() == pytest.approx(between.mean().item(), abs=1e-12)
    lone = torch.randn(1, 4, 8, requires_grad=True)
    repulsion_loss(lone, mask[:1]).backward()
    assert lone.grad.abs().max() == 0.0


def test_contrast_is_the_cross_entropy_of_the_own_anchor():
    rows = torch.randn(3, 4, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, False, True, True], [True, True, False, False]])
    anchors = torch.zeros(3, 4, dtype=torch.bool)
    anchors[:, 1] = True  # the second row has no anchor: its translations have nothing to find
    units = unit_rows(rows, mask)
    keys = units[[0, 2], 1]
    first = torch.stack([torch.log_softmax(keys @ units[0, m] / 0.1, 0)[0] for m in (0, 2, 3)])
    third = torch.log_softmax(keys @ units[2, 0] / 0.1, 0)[1]
    assert contrast_loss(rows, mask, anchors).item() == pytest.approx(-(first.mean() + third).item() / 3, abs=1e-12)
    whole = torch.ones(3, 4, dtype=torch.bool)
    assert contrast_loss(torch.ones(3, 4, 8), whole, anchors).item() == pytest.approx(math.log(3), abs=1e-6)
    apart = torch.eye(3, 8, dtype=torch.float64).unsqueeze(1).expand(3, 4, 8)
    floor = math.log(1 + 2 * math.exp(-1 / 0.1))
    assert contrast_loss(apart, whole, anchors).item() == pytest.approx(floor, rel=1e-9)
    lone = torch.randn(1, 4, 8, requires_grad=True)
    contrast_loss(lone, whole[:1], anchors[:1]).backward()
    assert lone.grad.abs().max() == 0.0
    assert torch.autograd.gradcheck(lambda x: contrast_loss(x, mask, anchors), rows.clone().requires_grad_())


def test_bad_input_names_what_is_allowed():
    with pytest.raises(ValueError, match=r"\(groups, languages, features\), got \(3, 4\)"):
        consistency_loss(torch.randn(3, 4))
    with pytest.raises(ValueError, match="positive, got 0"):
        consistency_loss(torch.randn(1, 3, 4), temperature=0)
    with pytest.raises(ValueError, match="'top', 'none'.*got 'first'"):
        consistency_loss(torch.randn(1, 3, 4), sigma_norm="first")
    with pytest.raises(ValueError, match="gram64.*got 'qr'"):
        singular_values(torch.randn(1, 3, 4), solver="qr")
