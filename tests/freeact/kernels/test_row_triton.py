"""One row's whole linear in one launch, against rounding and product as specified."""

import pytest
import torch

from optimum_freeact.kernels import reference
from tests.freeact.kernels.cases import input_side, of_several_linears, random_weight, rows_of, to


def errors(device, d, m, *, several=False, dtype=torch.bfloat16, n_bias=2, **side_options):
    """Relative errors of torch's way and of the kernel's, and the kernel's output."""
    from optimum_freeact.kernels import row_triton

    side = input_side(d, channel=False, **side_options)
    rank = side.tables.rank
    weight = random_weight(m, d, rank=rank, n_bias=n_bias)
    weight = of_several_linears(weight) if several else weight
    x, types = rows_of(1, d)
    types[:] = 1
    x = x.to(dtype)
    options = (side.tables.bits, side.tables.symmetric, side.tables.branch)
    outputs = []
    for way in (torch.float64, dtype):
        rows = reference.round_rows(x.to(way), types, side.found, side.clip, *options, way)
        outputs.append(reference.w4_linear(rows, types, weight, torch.float64, torch.float64))
    want, own = outputs
    got = row_triton.row_linear(x.to(device), types.to(device), to(side.tables, device), to(weight, device))
    assert got.dtype == dtype
    return float((own - want).norm() / want.norm()), float((got.cpu().double() - want).norm() / want.norm()), got


@pytest.mark.parametrize(("d", "m"), [(256, 40), (1024, 70), (4096, 33)])
def test_a_row_is_rounded_and_multiplied(device, d, m):
    own, kernel, _ = errors(device, d, m, rank=24)
    assert kernel <= 2 * own


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0}, {"means": False}, {"n_types": 1}, {"n_types": 5, "n_bias": 5}, {"bits": 8}, {"symmetric": True}, {"n_bias": 0},
        {"rank": 0, "means": False, "n_types": 1, "symmetric": True, "n_bias": 0}, {"dtype": torch.float16},
    ],
    ids=str,
)  # fmt: skip
def test_every_part_may_be_absent(device, options):
    own, kernel, _ = errors(device, 256, 40, **options)
    assert kernel <= 2 * own + 4e-3  # outputs are rounded to two bytes


def test_several_linears_as_one(device):
    own, kernel, _ = errors(device, 256, 768, several=True, rank=24)
    assert kernel <= 2 * own
