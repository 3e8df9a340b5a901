import math

import pytest
import torch

from optimum_freeact.numerics.metrics import relative_error, relative_error_of_types, sqnr_db


def test_known_errors():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.25 / 25)
    assert sqnr_db(torch.tensor([3.0, 4.5]), reference) == pytest.approx(20.0)
    assert relative_error(torch.zeros(2), reference) == 1
    assert sqnr_db(torch.zeros(2), reference) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_each_bit_is_worth_six_decibels(bits):
    """A uniform signal on a uniform grid: 20 log10(2) per bit."""
    signal = torch.rand(200000, dtype=torch.float64) - 0.5
    step = 2.0**-bits
    assert sqnr_db((signal / step).round() * step, signal) == pytest.approx(bits * 20 * math.log10(2), abs=0.05)


def test_limits():
    zero, one = torch.zeros(3), torch.ones(3)
    assert relative_error(zero, zero) == 0
    assert relative_error(one, one) == 0
    assert sqnr_db(one, one) == 300
    assert relative_error(one, zero) == math.inf
    assert sqnr_db(one, zero) == -math.inf
    assert math.isnan(relative_error(one * math.nan, one))
    assert math.isnan(sqnr_db(one * math.nan, one))
    assert math.isnan(relative_error(one, one * math.nan))


def test_half_precision_is_summed_in_double():
    reference = torch.full((70000,), 100.0, dtype=torch.float16)
    assert relative_error(reference + 1, reference) == pytest.approx(1e-4)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3,\), reference \(2, 3\)"):
        relative_error(torch.ones(3), torch.ones(2, 3))


def test_a_loud_type_does_not_hide_the_errors_of_the_others():
    reference = torch.tensor([[[1000.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    value, types = reference.clone(), torch.tensor([[1, 0, 0, 0]])
    value[0, 1:, 0] += 1
    assert relative_error(value, reference) < 1e-5
    assert relative_error_of_types(value, reference, types) == pytest.approx(3 / 4 * 3 / 4)
    assert relative_error_of_types(value, reference, None) == relative_error(value, reference)
    assert relative_error_of_types(value, reference, torch.zeros(3)) == relative_error(value, reference)
    value[0, 0] = 0
    assert relative_error_of_types(value, reference, types) == pytest.approx(3 / 4 * 3 / 4 + 1 / 4)
