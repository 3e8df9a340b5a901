"""The output head's product with bytes against float64."""

import pytest
import torch


@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 200, 256), (1, 33, 4112), (1, 40, 88), (3, 104, 96), (17, 70, 160), (64, 33, 576)]
)
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

    weight, scale = torch.randint(-127, 128, (20, 96), dtype=torch.int8), torch.ones(20, dtype=torch.bfloat16)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    y = w8_triton.w8_linear(x.to(device), weight.to(device), scale.to(device))
    assert y.isnan().all(1).tolist() == [False, True, False]
    alone = w8_triton.w8_linear(x[1:2].to(device), weight.to(device), scale.to(device))
    assert alone.isnan().all()


def test_all_bytes_and_a_weight_that_begins_anywhere(device):
    from optimum_freeact.kernels import w8_triton

    d = 256
    store = torch.zeros(3 * d + 4, dtype=torch.int8)
    weight = store[4 : 4 + 2 * d].view(2, d)
    weight[0], weight[1] = torch.arange(-128, 128).to(torch.int8), -128
    x = torch.zeros(1, d, dtype=torch.bfloat16)
    for place in (0, 1, 2, 3, 130, 255):
        x.zero_()[0, place] = 1.0
        for given in (weight, weight.clone()):
            moved = store.to(device)[4 : 4 + 2 * d].view(2, d) if given is weight else given.to(device)
            y = w8_triton.w8_linear(x.to(device), moved, torch.ones(2, dtype=torch.bfloat16).to(device))
            assert y.flatten().tolist() == [place - 128, -128]
