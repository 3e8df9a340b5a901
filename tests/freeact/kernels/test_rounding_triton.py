"""Triton's rounding of rows against its specification, at shapes of real models."""

import pytest
import torch

from optimum_freeact.kernels import reference
from tests.freeact.kernels.cases import input_side, means_of, rows_of, to


def own_and_kernel_error(device, d, n, dtype=torch.bfloat16, **side_options):
    """Share of codes that differ from float64's, of the kernel and of the specification in `dtype`'s own arithmetic."""
    from optimum_freeact.kernels import rounding_triton

    side = input_side(d, **side_options)
    x, types = rows_of(n, d)
    x = x.to(dtype)
    options = (side.tables.bits, side.tables.symmetric, side.tables.branch)
    exact = reference.round_rows(x.double(), types, side.found, side.clip, *options, torch.float64)
    own = reference.round_rows(x, types, side.found, side.clip, *options, dtype)
    got = rounding_triton.round_rows(x.to(device), types.to(device), to(side.tables, device))
    got = to(got, "cpu")
    values = [
        rows.codes.double() * rows.stats[0].double()[:, None] + rows.stats[1].double()[:, None]
        for rows in (exact, own, got)
    ]
    errors = [float((value - values[0]).norm() / values[0].norm()) for value in values[1:]]
    assert (got.codes.int() - exact.codes.int()).abs().max() <= 1
    torch.testing.assert_close(got.stats[2], got.codes.sum(1).float())
    exact = reference.marked(exact, types, side.tables.rank, means_of(side.tables))
    if exact.branch is not None:
        torch.testing.assert_close(got.branch.double(), exact.branch, rtol=1e-3, atol=1e-4 * exact.branch.abs().max())
    return errors


@pytest.mark.parametrize(
    ("d", "n"),
    [(96, 5), (576, 19), (576, 70), (896, 3), (4096, 2), (11008, 1), (4864, 1)],
    ids=lambda v: str(v),
)
def test_rows_are_rounded_as_specified(device, d, n):
    own, kernel = own_and_kernel_error(device, d, n, rank=min(24, d // 8))
    assert kernel <= 2 * own
    assert kernel < 0.03  # a code off by one where the value lies on the edge, nothing worse


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
        {"rank": 0, "means": False, "channel": False, "n_types": 1, "symmetric": True, "bits": 8},
    ],
    ids=str,
)
def test_every_part_may_be_absent(device, options):
    own, kernel = own_and_kernel_error(device, 192, 6, **options)
    assert kernel <= 2 * own


def test_half_precision_rows(device):
    own, kernel = own_and_kernel_error(device, 576, 5, dtype=torch.float16)
    assert kernel <= 2 * own


def test_what_is_not_finite_stays_so_and_touches_no_other_row(device):
    from optimum_freeact.kernels import rounding_triton

    side = input_side(96)
    x, types = rows_of(5, 96)
    clean = to(rounding_triton.round_rows(x.to(device), types.to(device), to(side.tables, device)), "cpu")
    x[1, 7], x[3, 50] = float("nan"), float("inf")
    rows = to(rounding_triton.round_rows(x.to(device), types.to(device), to(side.tables, device)), "cpu")
    assert rows.stats[0].isnan().tolist() == [False, True, False, True, False]
    assert torch.equal(rows.codes[[0, 2, 4]], clean.codes[[0, 2, 4]])
    assert not rows.codes[[1, 3]].any()


def test_constant_zero_huge_and_absent_rows(device):
    from optimum_freeact.kernels import rounding_triton

    side = input_side(96, means=False, rank=0)
    x = torch.zeros(3, 96, dtype=torch.bfloat16)
    x[1], x[2] = 3e36, 1e-28
    x[1, 1::2] *= -1
    tables, found = to(side.tables, device), side.found
    rows = to(rounding_triton.round_rows(x.to(device), None, tables), "cpu")
    want = reference.round_rows(x.double(), None, found, side.clip, 4, False, dtype=torch.float64)
    assert rows.stats[0, 0] == 1
    values, wanted = (r.codes * r.stats[0].double()[:, None] + r.stats[1].double()[:, None] for r in (rows, want))
    for value, want in zip(values, wanted, strict=True):
        assert (value - want).abs().max() <= 1e-3 * want.abs().max()
    empty = rounding_triton.round_rows(x[:0].to(device), None, tables)
    assert empty.codes.shape == (0, 96)


def test_tables_hold_the_map():
    """A Hadamard factor loses nothing in float16; any other at most its 12th bit."""
    for d, tolerance in ((576, 1e-6), (86 * 128, 1e-3)):
        side = input_side(d)
        again = side.tables.input_map()
        x, types = rows_of(4, d)
        for got, want in zip(again.apply(x.float(), types), side.found.apply(x.float(), types), strict=True):
            assert (got - want).norm() <= tolerance * want.norm() + 1e-6
