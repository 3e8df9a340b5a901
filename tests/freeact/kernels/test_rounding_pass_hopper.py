"""Gluon's rounding of rows in one pass (on a Hopper GPU), and when it is chosen (anywhere)."""

from types import SimpleNamespace

import pytest
import torch

from optimum_freeact.kernels import dispatch, ops, reference
from tests.freeact.kernels.cases import input_side, rows_of, to
from tests.freeact.kernels.test_hopper import needs_hopper
from tests.freeact.kernels.test_rounding_pass_triton import values


def rounded(side, x, types, **options):
    from optimum_freeact.kernels import rounding_pass_hopper

    given = None if types is None else types.cuda()
    return to(rounding_pass_hopper.round_rows(x.cuda(), given, to(side.tables, "cuda"), options=options), "cpu")


def check(d, n, dtype=torch.bfloat16, launch=None, **side_options):
    side = input_side(d, rank=0, channel=False, **side_options)
    x, types = rows_of(n, d, len(side.clip))
    x = x.to(dtype)
    options = (side.tables.bits, side.tables.symmetric, side.tables.branch)
    exact = reference.round_rows(x.double(), types, side.found, side.clip, *options, torch.float64)
    own = reference.round_rows(x, types, side.found, side.clip, *options, dtype)
    got = rounded(side, x, types, **(launch or {}))
    assert (got.codes.int() - exact.codes.int()).abs().max() <= 1
    assert torch.equal(got.stats[2], got.codes.sum(1).float())
    assert got.branch is None  # products choose biases by the types themselves
    errors = [float((values(rows) - values(exact)).norm() / values(exact).norm()) for rows in (own, got)]
    assert errors[1] <= 2 * errors[0]
    assert errors[1] < 0.03
    for _ in range(3):
        again = rounded(side, x, types, **(launch or {}))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, again, strict=True))


@needs_hopper
@pytest.mark.parametrize("d", [48 * 64, 64 * 64, 64 * 128, 96 * 128, 112 * 128, 128 * 128], ids=str)
@pytest.mark.parametrize("n", [1, 5, 300, 2048])
def test_rows_are_rounded_as_specified(d, n):
    check(d, n)


@needs_hopper
@pytest.mark.parametrize(
    "options",
    [{"means": False}, {"n_types": 1}, {"n_types": 5}, {"n_types": 12}, {"bits": 8}, {"symmetric": True}],
    ids=str,
)
def test_every_part_may_be_absent(options):
    check(4096, 70, **options)


@needs_hopper
def test_half_precision_rows():
    check(4096, 70, dtype=torch.float16)


@needs_hopper
@pytest.mark.parametrize("n", [1, 2, 300])
@pytest.mark.parametrize(
    "launch",
    [
        {"pdl": True},
        {"pdl": True, "early": True},
        {"per_processor": 1, "deep": 2, "soon": True},
        {"workers": 2, "deep": 2, "soon": True, "ahead": True},
    ],
    ids=str,
)
def test_launch_settings(n, launch):
    check(14336, n, launch=launch)


@needs_hopper
@pytest.mark.parametrize("d", [4096, 14336])
def test_what_is_not_finite_stays_so_and_touches_no_other_row(d):
    side = input_side(d, rank=0, channel=False)
    x, types = rows_of(300, d)
    clean = rounded(side, x, types)
    x[1, 7], x[3, 50], x[299, d - 1] = float("nan"), float("inf"), float("nan")
    rows = rounded(side, x, types)
    broken = torch.zeros(300, dtype=torch.bool)
    broken[[1, 3, 299]] = True
    assert torch.equal(rows.stats[0].isnan(), broken)
    assert torch.equal(rows.codes[~broken], clean.codes[~broken])
    assert not rows.codes[broken].any()
    assert not rows.stats[2, broken].any()


@needs_hopper
def test_constant_zero_huge_and_absent_rows():
    side = input_side(4096, means=False, rank=0, channel=False)
    x = torch.zeros(3, 4096, dtype=torch.bfloat16)
    x[1], x[2] = 3e36, 1e-28
    x[1, 1::2] *= -1
    rows = rounded(side, x, None)
    want = reference.round_rows(x.double(), None, side.found, side.clip, 4, False, dtype=torch.float64)
    assert rows.stats[0, 0] == pytest.approx(1, rel=1e-6)
    for value, wanted, step in zip(values(rows), values(want), want.stats[0].double(), strict=True):
        off = (value - wanted).abs()  # the same, or on the edge between two codes
        assert (off > 1e-3 * wanted.abs().max()).float().mean() <= 0.05
        assert off.max() <= 1.001 * step
    assert rounded(side, x[:0], None).codes.shape == (0, 4096)


@pytest.mark.parametrize(
    ("a", "b", "fits"),
    [
        (64, 64, True),
        (112, 128, True),
        (48, 64, True),
        (86, 128, False),
        (24, 24, False),
        (64, 80, False),
        (128, 256, False),
    ],
)
def test_sizes_that_it_takes(a, b, fits):
    assert dispatch.fits_hopper(a, b) == fits


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("moved", [0, 1])
def test_rows_that_it_takes(monkeypatch, channel, moved):
    monkeypatch.setattr(dispatch, "is_hopper", lambda index: True)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), data_ptr=lambda: 1024 + 2 * moved)
    tables = input_side(4096, rank=0, channel=channel).tables
    assert dispatch.hopper_rounding(x, tables) == (not channel and not moved)
    monkeypatch.setattr(dispatch, "is_hopper", lambda index: False)
    assert not dispatch.hopper_rounding(x, tables)


def test_what_fails_gives_way_in_turn(device, monkeypatch):
    """Hopper's kernel, then Triton's in one pass, then three launches, then torch."""
    from optimum_freeact.kernels import rounding_pass_triton, rounding_triton

    monkeypatch.setattr(ops, "_failed", {})
    monkeypatch.setattr(ops, "hopper_rounding", lambda x, tables: True)
    order = []

    def broken(name):
        def fail(*args, **options):
            order.append(name)
            raise RuntimeError(name)

        return fail

    def in_one_pass(module, *args):
        return broken(module)() if module == "rounding_pass_hopper" else rounding_pass_triton.round_rows(*args)

    monkeypatch.setattr(ops, "_in_one_pass", in_one_pass)
    monkeypatch.setattr(rounding_pass_triton, "round_rows", broken("rounding_pass_triton"))
    monkeypatch.setattr(rounding_triton, "round_rows", broken("rounding_triton"))
    side = input_side(96, rank=0)
    tables = to(side.tables, device)
    x, types = (t.to(device) for t in rows_of(3, 96))
    codes, _, branch = ops.round_rows(
        x, types, *tables.tensors(), tables.a, tables.b, tables.bits, tables.symmetric, tables.group
    )
    assert order == ["rounding_pass_hopper", "rounding_pass_triton", "rounding_triton"]
    assert set(ops.failures()) == {"round_pass_hopper[8x12]", "round_pass[8x12]", "round_rows[8x12]"}
    want = reference.round_rows(x.cpu().float(), types.cpu(), side.found, side.clip, 4, False, side.tables.branch)
    assert (codes.cpu() != want.codes).float().mean() < 0.01
    assert branch.shape == (3, 0)
