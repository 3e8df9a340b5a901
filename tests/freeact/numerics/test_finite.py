"""Every number that is not finite is found, wherever it stands; large ones are no such numbers."""

import pytest
import torch

from optimum_freeact.numerics.finite import all_finite


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 33), (3, 300, 301)], ids=str)
def test_one_number_is_enough(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(x)
    for place in (0, x.numel() // 2, x.numel() - 1):
        for value in (float("nan"), float("inf"), -float("inf")):
            wrong = x.clone()
            wrong.view(-1)[place] = value
            assert not all_finite(wrong)
    both = x.flatten().repeat(2)
    both[0], both[-1] = float("inf"), -float("inf")
    assert not all_finite(both)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_whose_sum_is_too_large_are_finite(dtype):
    x = torch.full((64, 65), torch.finfo(dtype).max, dtype=dtype)
    assert not x.sum().isfinite()
    assert all_finite(x)
    x[3, 4] = float("nan")
    assert not all_finite(x)


def test_nothing_is_finite_and_bytes_are_looked_at():
    assert all_finite(torch.empty(0, 4))
    assert all_finite(torch.tensor([1.0, -2.0]).to(torch.float8_e5m2))
    assert not all_finite(torch.tensor([1.0, float("inf")]).to(torch.float8_e5m2))
