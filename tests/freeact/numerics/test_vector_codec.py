import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_freeact.numerics.vector_codec import _round_down, decode, encode, grid_dtype, outward_grid, row_bytes


STORAGES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shift", [0.0, 30.0, -1000.0])
def test_error_is_at_most_half_of_the_stored_scale(bits, storage, shift):
    values = (
        torch.randn(200, 64, dtype=torch.float64) * torch.logspace(-4, 1, 200, dtype=torch.float64)[:, None] + shift
    )
    scale, low = outward_grid(values, bits, storage)
    restored = decode(encode(values, bits, storage), bits, 64, storage, torch.float64)
    assert (low.double() <= values).all()
    assert ((restored - values).abs() <= scale.double() / 2 * (1 + 1e-9)).all()
    if shift == 0:  # and the grid is not wastefully wide
        ideal = (values.amax(-1) - values.amin(-1)) / (2**bits - 1)
        assert (scale[:, 0].double() <= ideal * (1.02 if storage == torch.bfloat16 else 1.002) + 1e-7).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1, 5, 16, 64])
def test_row_size_and_leading_shape(bits, size):
    rows = encode(torch.randn(2, 3, 7, size), bits, torch.float16)
    assert rows.dtype == torch.uint8
    assert rows.shape == (2, 3, 7, row_bytes(size, bits))
    assert row_bytes(size, bits) == math.ceil(size * bits / 8) + 4
    assert decode(rows, bits, size, torch.float16, torch.float32).shape == (2, 3, 7, size)


def test_rows_can_be_cut_and_joined_like_vectors():
    values = torch.randn(2, 3, 10, 16)
    rows = encode(values, 4, torch.float16)
    parts = torch.cat((encode(values[:, :, :4], 4, torch.float16), encode(values[:, :, 4:], 4, torch.float16)), dim=2)
    assert torch.equal(rows, parts)
    transposed = encode(values.transpose(1, 2), 4, torch.float16)
    assert torch.equal(transposed.transpose(1, 2), rows)
    whole = decode(rows, 4, 16, torch.float16, torch.float32)
    assert torch.equal(decode(rows[:, 1:, ::2], 4, 16, torch.float16, torch.float32), whole[:, 1:, ::2])


@pytest.mark.parametrize("storage", STORAGES)
def test_constant_vectors_are_exact_when_storable(storage):
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, 1024.0]).double()[:, None].expand(-1, 8)
    assert torch.equal(decode(encode(values, 4, storage), 4, 8, storage, torch.float64), values)
    scale, _ = outward_grid(values, 4, storage)
    assert (scale == 1).all()


def test_values_on_the_grid_are_exact():
    values = (torch.arange(16).double() * 0.25 - 2)[torch.randperm(16)]
    assert torch.equal(decode(encode(values, 4, torch.float16), 4, 16, torch.float16, torch.float64), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_non_finite_value_makes_its_whole_vector_nan_and_no_other(bad, bits):
    values = torch.randn(3, 8)
    values[1, 2] = bad
    restored = decode(encode(values, bits, torch.float16), bits, 8, torch.float16, torch.float32)
    assert restored[1].isnan().all()
    assert restored[[0, 2]].isfinite().all()


def test_a_vector_beyond_the_storage_range_is_nan_not_clipped():
    values = torch.tensor([[-1e5, 0.0, 1.0, 2.0], [-6e4, 0.0, 1.0, 2.0]])
    restored = decode(encode(values, 4, torch.float16), 4, 4, torch.float16, torch.float32)
    assert restored[0].isnan().all()
    assert restored[1].isfinite().all()


def test_grid_type_follows_two_byte_models():
    assert grid_dtype(torch.bfloat16) == torch.bfloat16
    assert grid_dtype(torch.float16) == torch.float16
    assert grid_dtype(torch.float32) == torch.float16
    assert grid_dtype(torch.float64) == torch.float16


@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=200, deadline=None)
@given(value=st.floats(-60000, 60000, width=64))
def test_rounding_down_is_the_next_storable_number_below(storage, value):
    exact = torch.tensor([value], dtype=torch.float64)
    rounded = _round_down(exact, storage)
    above = torch.nextafter(rounded, torch.tensor([math.inf], dtype=storage))
    assert rounded.double() <= exact
    assert above.double() > exact
