"""Weights and activations in groups: Triton's rounding and products against their specification."""

import pytest
import torch

from optimum_freeact.kernels import reference
from tests.freeact.kernels.cases import input_side, means_of, of_several_linears, random_weight, rows_of, to


def values_of(rows):
    return rows.codes.double() * rows.stats[0].double()[:, None]


def errors(device, d, n, group, dtype=torch.bfloat16, **options):
    """Relative errors of torch's rounding in `dtype` and of the kernel's, against float64's."""
    from optimum_freeact.kernels import rounding_triton

    side = input_side(d, group=group, **options)
    x, types = rows_of(n, d, options.get("n_types", 2))
    x = x.to(dtype)
    asked = (side.tables.bits, side.tables.symmetric, side.tables.branch)
    exact = reference.round_rows(x.double(), types, side.found, side.clip, *asked, torch.float64, group)
    own = reference.round_rows(x, types, side.found, side.clip, *asked, dtype, group)
    got = to(rounding_triton.round_rows(x.to(device), types.to(device), to(side.tables, device)), "cpu")
    assert got.codes.dtype == torch.float16
    exact = reference.marked(exact, types, side.tables.rank, means_of(side.tables))
    if exact.branch is not None:
        torch.testing.assert_close(got.branch.double(), exact.branch, rtol=1e-3, atol=1e-4 * exact.branch.abs().max())
    want = values_of(exact)
    return [float((values_of(rows) - want).norm() / want.norm()) for rows in (own, got)]


@pytest.mark.parametrize(
    ("d", "n", "group"),
    [(96, 5, 16), (576, 19, 16), (1536, 5, 16), (1536, 3, 32), (896, 3, 32), (4096, 2, 16), (576, 3, 576), (2048, 2, 64), (96, 3, 6)],
    ids=str,
)  # fmt: skip
def test_groups_are_rounded_as_specified(device, d, n, group):
    """Sizes whose tiles hold whole groups in a row, and such that do not."""
    own, kernel = errors(device, d, n, group, rank=min(24, d // 8))
    assert kernel <= 2 * own
    assert kernel < 0.03


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"means": False},
        {"channel": False},
        {"n_types": 1},
        {"n_types": 5},
        {"bits": 8},
        {"symmetric": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [16, 48, 192])
def test_every_part_may_be_absent(device, options, group):
    own, kernel = errors(device, 192, 6, group, **options)
    assert kernel <= 2 * own


@pytest.mark.parametrize("d", [96, 256])
def test_what_is_not_finite_stays_so_and_touches_no_other_row(device, d):
    from optimum_freeact.kernels import rounding_triton

    side = to(input_side(d, group=16).tables, device)
    x, types = rows_of(5, d)
    clean = to(rounding_triton.round_rows(x.to(device), types.to(device), side), "cpu")
    x[1, 7], x[3, 50] = float("nan"), float("inf")
    rows = to(rounding_triton.round_rows(x.to(device), types.to(device), side), "cpu")
    assert rows.codes.isnan().all(1).tolist() == [False, True, False, True, False]
    assert torch.equal(rows.codes[[0, 2, 4]], clean.codes[[0, 2, 4]])


def test_constant_zero_huge_and_absent_rows(device):
    from optimum_freeact.kernels import rounding_triton

    side = input_side(256, means=False, rank=0, group=16)
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    x[1], x[2] = 3e36, 1e-28
    x[1, 1::2] *= -1
    tables = to(side.tables, device)
    got = values_of(to(rounding_triton.round_rows(x.to(device), None, tables), "cpu"))
    want = values_of(
        reference.round_rows(x.double(), None, side.found, side.clip, 4, False, dtype=torch.float64, group=16)
    )
    for value, expected in zip(got, want, strict=True):
        assert (value - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert rounding_triton.round_rows(x[:0].to(device), None, tables).codes.shape == (0, 256)


def random_values(n, d, rank=4, width=16, seed=3):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(n, d, generator=generator) * 4).half()
    branch = torch.zeros(n, width)
    branch[:, :rank] = torch.randn(n, rank, generator=generator)
    return reference.Rows(values, torch.rand(1, n, generator=generator) + 0.1, branch if rank else None)


def both(device, rows, types, weight, plain_cores=False, **options):
    from optimum_freeact.kernels import groups_gemv_triton, w4_groups_triton

    rank, n_bias = (0 if t is None else t.shape[d] for t, d in ((weight.low_rank, 1), (weight.type_bias, 0)))
    rows = reference.marked(rows, types, rank, n_bias)
    got = (groups_gemv_triton if plain_cores else w4_groups_triton).w4_linear(
        to(rows, device), None if types is None else types.to(device), to(weight, device), torch.float32, **options
    )
    return got.cpu().double(), reference.w4_linear(rows, types, weight, torch.float64, torch.float64)


@pytest.mark.parametrize("group", [0, 16, 32, 64])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 40, 192), (3, 33, 320), (17, 130, 320), (70, 33, 576)])
def test_products_of_whole_numbers_are_exact(device, n, m, d, group):
    """Whole values meet codes times their groups' bytes, worst cases included, without rounding."""
    weight = random_weight(m, d, rank=0, n_bias=0, group=group)._replace(qscale=torch.ones(m))
    if group:
        weight.group_scale[0] = -127
    weight.packed[0] = 0  # all codes -8
    rows = random_values(n, d, rank=0)._replace(stats=torch.ones(1, n))
    rows.codes.round_()
    for plain_cores in (False, True) if n <= 4 else (False,):
        got, want = both(device, rows, None, weight, plain_cores)
        assert torch.equal(got, want)


@pytest.mark.parametrize(("rank", "n_bias"), [(4, 2), (0, 2), (4, 0), (0, 0), (4, 1), (0, 5)])
@pytest.mark.parametrize("n", [3, 70])
def test_everything_that_follows(device, n, rank, n_bias):
    weight = random_weight(50, 160, rank=rank, n_bias=n_bias, group=32)
    rows = random_values(n, 160, rank=rank)
    for plain_cores in (False, True) if n <= 4 else (False,):
        got, want = both(device, rows, torch.arange(n) % max(n_bias, 1), weight, plain_cores)
        assert (got - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize(("n", "plain_cores"), [(1, True), (5, False)])
def test_several_linears_as_one(device, n, plain_cores):
    rows, weight = random_values(n, 96), of_several_linears(random_weight(512, 96, group=32))
    got, want = both(device, rows, torch.arange(n) % 2, weight, plain_cores)
    assert (got - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("split", [1, 2, 3])
def test_parts_of_a_row_are_summed_the_same_again(device, split):
    weight, rows = random_weight(70, 640, group=32), random_values(5, 640)
    types = torch.zeros(5, dtype=torch.long)
    results = [both(device, rows, types, weight, options={"SPLIT": split, "BK": 64}) for _ in range(3)]
    assert all(torch.equal(got, results[0][0]) for got, _ in results)
    assert (results[0][0] - results[0][1]).norm() <= 2e-5 * results[0][1].norm()


def test_nan_goes_through(device):
    weight, rows = random_weight(20, 96, group=32), random_values(3, 96)
    rows.codes[1] = float("nan")
    for plain_cores in (False, True):
        got, _ = both(device, rows, torch.zeros(3, dtype=torch.long), weight, plain_cores)
        assert got.isnan().all(1).tolist() == [False, True, False]
        assert got[[0, 2]].isfinite().all()
