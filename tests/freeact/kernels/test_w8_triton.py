"""The output head's product with bytes against float64."""

import pytest
import torch


@pytest.mark.parametrize(("n", "m", "d"), [(1, 200, 256), (3, 104, 96), (17, 70, 160), (64, 33, 576)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_as_good_as_torchs(device, n, m, d, dtype):
    from optimum_freeact.kernels import w8_triton

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (m, d), dtype=torch.int8, generator=generator)
    scale = (torch.rand(m, generator=generator) * 1e-3 + 1e-3).to(dtype)
    got = w8_triton.w8_linear(x.to(device), weight.to(device), scale.to(device))
    plain = weight.to(dtype) * scale[:, None]
    want = x.double() @ (weight.double() * scale.double()[:, None]).mT
    own = torch.nn.functional.linear(x.to(device), plain.to(device)).cpu()
    assert got.dtype == dtype
    assert (got.cpu().double() - want).norm() <= 2 * (own.double() - want).norm()


def test_a_row_that_is_not_finite_touches_no_other(device):
    from optimum_freeact.kernels import w8_triton

    x = torch.randn(3, 96, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    weight, scale = torch.randint(-127, 128, (20, 96), dtype=torch.int8), torch.ones(20, dtype=torch.bfloat16)
    y = w8_triton.w8_linear(x.to(device), weight.to(device), scale.to(device))
    assert y.isnan().all(1).tolist() == [False, True, False]
