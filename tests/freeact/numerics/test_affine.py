import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_freeact.numerics.affine import (
    QParams,
    asymmetric_qparams,
    choose_qparams,
    code_range,
    dequantize,
    fake_quantize,
    fake_quantize_ste,
    quantize,
    symmetric_qparams,
)


BITS = [2, 3, 4, 8]
ROWS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=33)


def test_code_ranges():
    assert [code_range(bits) for bits in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=100, deadline=None)
@given(row=ROWS)
def test_codes_stay_in_range_and_errors_below_half_a_step(bits, symmetric, row):
    values = torch.tensor([row], dtype=torch.float64)
    qparams = choose_qparams(values, bits, symmetric)
    codes = quantize(values, qparams, bits)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= code_range(bits)[0]
    assert codes.max() <= code_range(bits)[1]
    slack = 1e-12 * values.abs().max()
    assert ((dequantize(codes, qparams) - values).abs() <= qparams.scale / 2 * (1 + 1e-9) + slack).all()


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_those_of_the_formulas(bits):
    values = torch.tensor([[-3.0, 1.0, 2.0], [0.5, 4.0, 1.0]], dtype=torch.float64)
    symmetric, asymmetric = symmetric_qparams(values, bits), asymmetric_qparams(values, bits)
    torch.testing.assert_close(symmetric.scale[:, 0], torch.tensor([3.0, 4.0]).double() / (2 ** (bits - 1) - 0.5))
    torch.testing.assert_close(asymmetric.scale[:, 0], torch.tensor([5.0, 3.5]).double() / (2**bits - 1))
    assert symmetric.offset is None
    low = asymmetric.offset + code_range(bits)[0] * asymmetric.scale
    torch.testing.assert_close(low[:, 0], torch.tensor([-3.0, 0.5]).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_keeps_the_middle_of_the_range(symmetric):
    values = torch.tensor([[-8.0, 0.1, 2.0, 4.0]], dtype=torch.float64)
    qparams = choose_qparams(values, 4, symmetric, clip=0.5)
    ends = dequantize(torch.tensor([[-8.0, 7.0]]), qparams)
    # symmetric: 15 steps of 8 / 2 / 7.5; asymmetric: the middle, -2, plus and minus half of 6
    expected = torch.tensor([[-8.0, 7.0]]) * 4 / 7.5 if symmetric else torch.tensor([[-5.0, 1.0]])
    torch.testing.assert_close(ends, expected.double(), rtol=0, atol=1e-6)
    assert quantize(values, qparams, 4)[0, 0] == -8
    per_row = choose_qparams(values.expand(2, -1), 4, symmetric, clip=torch.tensor([[0.5], [1.0]]).double())
    assert torch.equal(per_row.scale[0], qparams.scale[0])
    assert per_row.scale[1] > per_row.scale[0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [None, 0.75])
def test_values_on_the_grid_survive_exactly(bits, offset):
    qmin, qmax = code_range(bits)
    qparams = QParams(torch.tensor(0.25), None if offset is None else torch.tensor(offset))
    codes = torch.arange(qmin, qmax + 1).float()
    values = dequantize(codes, qparams)
    assert torch.equal(quantize(values, qparams, bits), codes)
    assert torch.equal(fake_quantize_ste(values, qparams, bits), values)


def test_ties_round_to_even_and_the_ends_clamp():
    values = torch.tensor([-9.0, -8.5, -7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 9.0])
    codes = quantize(values, QParams(torch.tensor(1.0), None), 4)
    assert codes.tolist() == [-8, -8, -8, -2, -2, 0, 0, 2, 2, 6, 7, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows(dtype, symmetric):
    values = torch.zeros(2, 5, dtype=dtype)
    qparams = choose_qparams(values, 4, symmetric)
    assert torch.equal(qparams.scale, torch.ones(2, 1, dtype=dtype))
    assert torch.equal(fake_quantize(values, 4, symmetric), values)


@pytest.mark.parametrize("constant", [3.0, -0.1, 1e-30, 7e4])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_constant_rows_are_exact_on_the_asymmetric_grid(constant, clip):
    values = torch.full((2, 5), constant)
    assert torch.equal(fake_quantize(values, 4, symmetric=False, clip=clip), values)


def test_asymmetric_is_indifferent_to_a_shift():
    values = torch.randn(6, 40, dtype=torch.float64)
    shifted = fake_quantize(values + 100, 4, symmetric=False) - 100
    torch.testing.assert_close(shifted, fake_quantize(values, 4, symmetric=False), rtol=0, atol=1e-10)
    assert not torch.allclose(fake_quantize(values + 100, 4, True) - 100, fake_quantize(values, 4, True), atol=0.1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_independent_and_strides_do_not_matter(symmetric):
    values = torch.randn(8, 6, dtype=torch.float64)
    whole = fake_quantize(values.mT, 4, symmetric)
    assert torch.equal(whole, fake_quantize(values.mT.contiguous(), 4, symmetric))
    assert torch.equal(whole[2:3], fake_quantize(values.mT[2:3], 4, symmetric))
    assert torch.equal(
        fake_quantize(values.view(2, 4, 6), 4, symmetric).view(8, 6), fake_quantize(values, 4, symmetric)
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_are_closer_and_sixteen_change_nothing(symmetric):
    values = torch.randn(16, 64)
    errors = [(fake_quantize(values, bits, symmetric) - values).square().mean() for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] > 100 * errors[3]
    assert fake_quantize(values, 16, symmetric) is values


def test_half_precision_range_does_not_overflow():
    values = torch.tensor([[-60000.0, 60000.0, 1000.0]], dtype=torch.float16)
    assert fake_quantize(values, 8, symmetric=False).isfinite().all()
    assert (fake_quantize(values, 8, symmetric=False) - values).abs().max() <= 120000 / 255


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_with_non_finite_values_come_out_nan_and_others_are_untouched(bad, symmetric):
    values = torch.randn(3, 6)
    values[1, 4] = bad
    qparams = choose_qparams(values, 4, symmetric)
    assert quantize(values, qparams, 4)[1, 4].isnan()
    restored = fake_quantize(values, 4, symmetric)
    assert restored[1].isnan().all()
    assert torch.equal(restored[[0, 2]], fake_quantize(values[[0, 2]], 4, symmetric))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("offset", [None, torch.tensor(0.5)])
def test_non_finite_values_have_no_code_on_a_given_grid(bad, offset):
    values, qparams = torch.tensor([0.5, bad, 100.0]), QParams(torch.tensor(0.5), offset)
    assert quantize(values, qparams, 4).isnan().tolist() == [False, True, False]
    assert fake_quantize_ste(values, qparams, 4).isnan().tolist() == [False, True, False]


def test_finite_values_far_outside_a_grid_clamp():
    """Even where value / scale overflows: only what is not finite itself is refused."""
    values = torch.tensor([3e38, -3e38])
    assert quantize(values, QParams(torch.tensor(1e-10), None), 4).tolist() == [7, -8]


def test_straight_through_value_and_gradients():
    values = torch.tensor([-0.9, 0.33, 5.0, -5.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    offset = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    result = fake_quantize_ste(values, QParams(scale, offset), 4)
    codes = torch.tensor([-5.0, 1.0, 7.0, -8.0], dtype=torch.float64)
    torch.testing.assert_close(result, codes * 0.2 + 0.1)
    assert torch.equal(result, dequantize(quantize(values, QParams(scale, offset), 4), QParams(scale, offset)))
    result.sum().backward()
    assert values.grad.tolist() == [1, 1, 0, 0]  # inside the range the identity, beyond it a constant
    # d/dscale: inside, code - shifted / scale; beyond, the end's code. d/doffset: 0 inside, 1 beyond
    inside = (codes - (values.detach() - 0.1) / 0.2)[:2].sum()
    torch.testing.assert_close(scale.grad, (inside + 7 - 8)[None])
    torch.testing.assert_close(offset.grad, torch.tensor([2.0], dtype=torch.float64))
