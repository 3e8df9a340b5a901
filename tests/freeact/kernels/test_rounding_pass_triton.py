"""Triton's rounding of rows in one pass against its specification and against the three launches that serve branches."""

from dataclasses import replace

import pytest
import torch

from optimum_freeact.kernels import ops, reference
from tests.freeact.kernels.cases import input_side, rows_of, to


def values(rows):
    scale, offset, _ = rows.stats.double().unsqueeze(-1)
    return rows.codes.double() * scale + offset


def rounded(side, x, types, device, **options):
    """What the kernel makes of rows."""
    from optimum_freeact.kernels import rounding_pass_triton

    assert side.tables.one_pass
    given = None if types is None else types.to(device)
    return to(rounding_pass_triton.round_rows(x.to(device), given, to(side.tables, device), options=options), "cpu")


def own_and_kernel_error(device, d, n, dtype=torch.bfloat16, launch=None, **side_options):
    """Distance of rounded values from float64's, of the specification in `dtype`'s own arithmetic and of the kernel."""
    side = input_side(d, rank=0, **side_options)
    x, types = rows_of(n, d, len(side.clip))
    x = x.to(dtype)
    options = (side.tables.bits, side.tables.symmetric, side.tables.branch)
    exact = reference.round_rows(x.double(), types, side.found, side.clip, *options, torch.float64)
    own = reference.round_rows(x, types, side.found, side.clip, *options, dtype)
    got = rounded(side, x, types, device, **(launch or {}))
    assert (got.codes.int() - exact.codes.int()).abs().max() <= 1
    torch.testing.assert_close(got.stats[2], got.codes.sum(1).float())
    assert got.branch is None  # products choose biases by the types themselves
    return [float((values(r) - values(exact)).norm() / values(exact).norm()) for r in (own, got)]


@pytest.mark.parametrize(
    ("d", "n"),
    [(96, 5), (576, 19), (576, 70), (896, 3), (4096, 2), (1152, 4), (86 * 128, 1), (4864, 1), (14336, 2)],
    ids=lambda v: str(v),
)
def test_rows_are_rounded_as_specified(device, d, n):
    own, kernel = own_and_kernel_error(device, d, n, channel=False)
    assert kernel <= 2 * own
    assert kernel < 0.03  # a code off by one where the value lies on the edge, nothing worse


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"means": False},
        {"channel": False},
        {"n_types": 1},
        {"n_types": 5},
        {"n_types": 12},
        {"bits": 8},
        {"symmetric": True},
        {"means": False, "channel": False, "n_types": 1, "symmetric": True, "bits": 8},
    ],
    ids=str,
)
def test_every_part_may_be_absent(device, options):
    own, kernel = own_and_kernel_error(device, 192, 6, **options)
    assert kernel <= 2 * own


def test_half_precision_rows(device):
    own, kernel = own_and_kernel_error(device, 576, 5, dtype=torch.float16)
    assert kernel <= 2 * own


@pytest.mark.parametrize(
    "launch", [{"programs": 3}, {"programs": 3, "ahead": True}, {"warps": 4, "stages": 2}, {"warps": 1}], ids=str
)
def test_programs_go_through_rows(device, launch):
    own, kernel = own_and_kernel_error(device, 96, 10, launch=launch)
    assert kernel <= 2 * own
    side = input_side(96, rank=0)
    x, types = rows_of(10, 96)
    for one, other in zip(rounded(side, x, types, device, **launch), rounded(side, x, types, device), strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("n_types", [2, 3, 5])
@pytest.mark.parametrize("d", [96, 1536])
def test_asking_for_means_changes_nothing(device, d, n_types, channel):
    if device == "cpu":
        pytest.skip("the interpreter asks for nothing ahead")
    side = input_side(d, rank=0, n_types=n_types, channel=channel)
    x, types = rows_of(9, d, n_types)
    types[-1] = n_types + 2  # beyond the last
    found, expected = (rounded(side, x, types, device, ask=ask, programs=4) for ask in (2, 0))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.stats, expected.stats)


@pytest.mark.parametrize("ask", [0, 4])
def test_means_and_clips_may_differ_in_number(device, ask):
    many, one = (input_side(96, rank=0, n_types=n, channel=False) for n in (3, 1))
    x, types = rows_of(9, 96, 3)
    assert not torch.equal(many.tables.mean[1], many.tables.mean[0])
    for tables, alone in (
        ({"mean": one.tables.mean, "reach": one.tables.reach}, {"clip": many.tables.clip}),
        ({"clip": one.tables.clip}, {"mean": many.tables.mean, "reach": many.tables.reach}),
    ):
        found = rounded(many._replace(tables=replace(many.tables, **tables)), x, types, device, ask=ask)
        for kind in range(3):  # what a row of the type gets from tables that hold nothing else
            own = {name: value[kind : kind + 1] for name, value in alone.items() if name != "reach"}
            if "reach" in alone:  # the last is that of the channel scale
                own["reach"] = torch.stack((alone["reach"][kind], alone["reach"][-1]))
            expected = rounded(many._replace(tables=replace(many.tables, **tables, **own)), x, None, device)
            here = types == kind
            assert torch.equal(found.codes[here], expected.codes[here])
            assert torch.equal(found.stats[:, here], expected.stats[:, here])


def test_lines_cover_what_is_asked_for(device):
    from optimum_freeact.kernels.prefetch_triton import LINE, MOST_BYTES, lines_of

    for numbers, size in ((1, 4), (64, 2), (65, 2), (3 * 576, 2), (MOST_BYTES // 2, 2)):
        lines = lines_of(numbers, size)
        assert lines * LINE.value >= numbers * size
        assert lines & (lines - 1) == 0  # Triton's ranges
    assert lines_of(MOST_BYTES // 2 + 1, 2) == 0  # means of many types: a batch has few of them


def test_codes_are_those_of_three_launches_but_for_edges(device):
    from optimum_freeact.kernels import rounding_triton

    side = input_side(576, rank=0)
    x, types = rows_of(40, 576)
    one = rounded(side, x, types, device)
    three = to(rounding_triton.round_rows(x.to(device), types.to(device), to(side.tables, device)), "cpu")
    assert (one.codes != three.codes).float().mean() < 0.01
    assert one.branch is three.branch is None
    torch.testing.assert_close(one.stats[:2], three.stats[:2], rtol=2e-3, atol=2e-3)


def test_what_is_not_finite_stays_so_and_touches_no_other_row(device):
    for d in (96, 1152):
        side = input_side(d, rank=0)
        x, types = rows_of(5, d)
        clean = rounded(side, x, types, device, programs=1)
        x[1, 7], x[3, 50] = float("nan"), float("inf")
        rows = rounded(side, x, types, device, programs=1)
        assert rows.stats[0].isnan().tolist() == [False, True, False, True, False]
        assert rows.stats[2, [1, 3]].tolist() == [0, 0]
        assert torch.equal(rows.codes[[0, 2, 4]], clean.codes[[0, 2, 4]])
        assert not rows.codes[[1, 3]].any()


def test_constant_zero_huge_and_absent_rows(device):
    side = input_side(96, means=False, rank=0)
    x = torch.zeros(3, 96, dtype=torch.bfloat16)
    x[1], x[2] = 3e36, 1e-28
    x[1, 1::2] *= -1
    rows = rounded(side, x, None, device)
    want = reference.round_rows(x.double(), None, side.found, side.clip, 4, False, dtype=torch.float64)
    assert rows.stats[0, 0] == pytest.approx(1, rel=1e-6)
    for value, wanted in zip(values(rows), values(want), strict=True):
        assert (value - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    empty = rounded(side, x[:0], None, device)
    assert empty.codes.shape == (0, 96)


def test_what_runs_in_one_pass():
    assert input_side(14336, rank=0).tables.one_pass
    assert not input_side(96, rank=4).tables.one_pass
    assert not input_side(96, rank=0, group=16).tables.one_pass
    assert not input_side(128 * 148, rank=0).tables.one_pass  # its factors leave no room for the tile


@pytest.mark.parametrize("failed", ["round_pass", "round_pass[8x12]"])
def test_three_launches_take_the_place_of_one_that_failed(device, monkeypatch, failed):
    from optimum_freeact.kernels import rounding_pass_triton

    side = input_side(96, rank=0)
    tables = to(side.tables, device)
    x, types = (t.to(device) for t in rows_of(3, 96))
    sizes = (tables.a, tables.b, tables.bits, tables.symmetric, tables.group)
    wanted = ops.round_rows(x, types, *tables.tensors(), *sizes)
    called = []
    monkeypatch.setattr(rounding_pass_triton, "round_rows", lambda *args: called.append(args))
    monkeypatch.setattr(ops, "_failed", {failed: "a test"})
    codes, stats, branch = ops.round_rows(x, types, *tables.tensors(), *sizes)
    assert not called
    assert set(ops.failures()) == {failed}
    assert (codes != wanted[0]).float().mean() < 0.01
    assert torch.equal(branch, wanted[2])


def test_a_gpu_that_rounds_wrongly_is_remembered(monkeypatch, caplog):
    from optimum_freeact.kernels import self_check

    monkeypatch.setattr(ops, "_failed", {})
    monkeypatch.setattr(self_check, "pass_obstacle", lambda index, module: f"codes of {module}")
    monkeypatch.setattr(ops, "is_hopper", lambda index: True)
    ops.check_pass(torch.device("cpu"))
    assert ops.failures() == {}
    ops.check_pass(torch.device("cuda", 0))
    assert ops.failures() == {
        "round_pass": "codes of rounding_pass_triton",
        "round_pass_hopper": "codes of rounding_pass_hopper",
    }
    assert "round_pass failed (codes of" in caplog.text
