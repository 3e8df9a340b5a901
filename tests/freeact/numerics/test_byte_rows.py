"""Rows in bytes: the error stays below half a step of the group, whatever else is in the row."""

import pytest
import torch

from optimum_freeact.numerics.byte_rows import from_bytes, group_size, to_bytes


@pytest.mark.parametrize("n", [576, 1536, 40, 7, 1])
def test_no_number_is_off_by_more_than_half_a_step(n):
    rows = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0, 0] = 3000.0
    codes, scale = to_bytes(rows)
    assert (codes.dtype, scale.dtype, codes.shape) == (torch.int8, torch.bfloat16, rows.shape)
    size = group_size(n)
    assert scale.shape == (3, n // size)
    peak = rows.unflatten(-1, (-1, size)).abs().amax(-1).repeat_interleave(size, -1)
    error = (from_bytes(codes, scale, torch.float64) - rows).abs()
    assert (error <= peak * (0.5 / 127 + 2**-8)).all()
    assert (from_bytes(codes, scale) == from_bytes(codes, scale, torch.float64).float()).all()


def test_a_massive_entry_costs_only_its_own_group():
    rows = torch.randn(1, 576, generator=torch.Generator().manual_seed(0))
    calm = (from_bytes(*to_bytes(rows)) - rows)[0, 64:]
    rows[0, 0] = 1e4
    assert torch.equal((from_bytes(*to_bytes(rows)) - rows)[0, 64:], calm)
    assert calm.square().mean() < 1e-4


def test_zeros_stay_zeros():
    codes, scale = to_bytes(torch.zeros(2, 64))
    assert not codes.any()
    assert not from_bytes(codes, scale).any()
