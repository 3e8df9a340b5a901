import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_freeact.numerics.kronecker import factor_pair, kron_apply, partial_traces


SIZES = [(1, 1), (1, 7), (7, 1), (2, 3), (4, 4), (8, 6), (24, 24)]


def gaussian(*shape):
    return torch.randn(*shape, dtype=torch.float64) / math.sqrt(shape[-1])


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 20000))
def test_factor_pair_is_the_nearest_to_the_square_root(n):
    a, b = factor_pair(n)
    assert a * b == n
    assert a <= b
    assert not any(n % c == 0 for c in range(a + 1, math.isqrt(n) + 1))


def test_factor_pairs_of_real_models_and_primes():
    widths = {576: (24, 24), 1536: (32, 48), 896: (28, 32), 4864: (64, 76), 4096: (64, 64), 11008: (86, 128)}
    assert {n: factor_pair(n) for n in widths} == widths
    assert [factor_pair(n) for n in (1, 2, 97)] == [(1, 1), (1, 2), (1, 97)]


@pytest.mark.parametrize("n", [0, -4])
def test_factor_pair_of_nothing(n):
    with pytest.raises(ValueError, match=f"positive size, got {n}"):
        factor_pair(n)


@pytest.mark.parametrize(("a", "b"), SIZES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_kron_apply_is_the_product_with_kron(a, b, shape):
    x, left, right = gaussian(*shape, a * b), gaussian(a, a), gaussian(b, b)
    torch.testing.assert_close(kron_apply(x, left, right), x @ torch.kron(left, right), rtol=0, atol=1e-12)


def test_kron_apply_of_strided_input():
    x, left, right = gaussian(12, 5).mT, gaussian(3, 3).mT, gaussian(8, 4)[::2]
    expected = x @ torch.kron(left.contiguous(), right.contiguous())
    torch.testing.assert_close(kron_apply(x, left, right), expected, rtol=0, atol=1e-12)


def test_inverse_factors_undo():
    x, left, right = gaussian(7, 24), gaussian(4, 4), gaussian(6, 6)
    there = kron_apply(x, left, right)
    back = kron_apply(there, torch.linalg.inv(left), torch.linalg.inv(right))
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)


def test_activations_and_weights_keep_their_product():
    """x T with W T^-T leaves the logits: kron_apply on both sides."""
    x, weight, left, right = gaussian(7, 24), gaussian(5, 24), gaussian(4, 4), gaussian(6, 6)
    inverse_t = [torch.linalg.inv(factor).mT for factor in (left, right)]
    product = kron_apply(x, left, right) @ kron_apply(weight, *inverse_t).mT
    torch.testing.assert_close(product, x @ weight.mT, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("a", "b"), [(1, 4), (3, 1), (3, 4), (5, 5)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_partial_traces_are_those_of_the_definition(a, b, symmetric):
    matrix, left, right = gaussian(a * b, a * b), gaussian(a, a), gaussian(b, b)
    if symmetric:
        matrix, left, right = (m @ m.mT for m in (matrix, left, right))
    over_right, over_left = partial_traces(matrix, left, right)
    with_right = (matrix @ torch.kron(torch.eye(a).double(), right)).view(a, b, a, b)
    with_left = (matrix @ torch.kron(left, torch.eye(b).double())).view(a, b, a, b)
    for i in range(a):
        for j in range(a):
            torch.testing.assert_close(over_right[i, j], with_right[i, :, j, :].trace(), rtol=0, atol=1e-12)
    for i in range(b):
        for j in range(b):
            torch.testing.assert_close(over_left[i, j], with_left[:, i, :, j].trace(), rtol=0, atol=1e-12)


def test_partial_traces_of_a_product_and_of_a_strided_matrix():
    left, right = gaussian(3, 3), gaussian(4, 4)
    matrix = torch.kron(left, right)
    over_right, over_left = partial_traces(matrix, torch.eye(3).double(), torch.eye(4).double())
    torch.testing.assert_close(over_right, left * right.trace(), rtol=0, atol=1e-12)
    torch.testing.assert_close(over_left, right * left.trace(), rtol=0, atol=1e-12)
    strided = partial_traces(matrix.mT, left, right)
    for got, expected in zip(strided, partial_traces(matrix.mT.contiguous(), left, right)):
        assert torch.equal(got, expected)
