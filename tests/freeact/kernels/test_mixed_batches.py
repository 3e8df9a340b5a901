"""A token gets the same bits in a batch of mixed types as among tokens of its own type, whichever kernel runs it."""

import pytest
import torch

from optimum_freeact.kernels import ops
from tests.freeact.kernels.cases import input_side, random_weight, rows_of, to


ON_GPU = torch.cuda.is_available()
# rows, inputs, outputs: those of a GPU reach each kernel, the last one the kernel with roles on Hopper
SIZES = [(1, 576, 192), (3, 96, 40), (16, 192, 64), (70, 96, 40)]
LARGE = [(1, 4096, 512), (16, 4096, 4096), (40, 2048, 512), (300, 576, 1536), (300, 2048, 2048), (2048, 2048, 14336)]
LARGE += [(300, 4096, 512), (600, 14336, 256)]


def outputs(x, types, tables, weight):
    rows = ops.round_rows(x, types, *tables.tensors(), tables.a, tables.b, 4, False, tables.group)
    return *rows, ops.w4_linear(*rows, types, *weight, torch.bfloat16)


@pytest.mark.parametrize("n_types", [3, 5, 12])
@pytest.mark.parametrize("rank", [0, 24, 48])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(("n", "d", "m"), SIZES + (LARGE if ON_GPU else []), ids=str)
def test_bits_do_not_depend_on_the_neighbours_types(monkeypatch, device, n, d, m, group, rank, n_types):
    if not ON_GPU and (rank, n_types) != (24, 3) and (rank, n_types, n) not in ((0, 12, 3), (0, 5, 16)):
        pytest.skip("the interpreter sees the same code with other numbers: a GPU compiles each anew")
    monkeypatch.setattr(ops, "_failed", {})
    monkeypatch.setattr(ops, "_attempt", lambda name, kernel, fallback: kernel())
    side = input_side(d, rank=rank, n_types=n_types, channel=False, group=group)
    tables = to(side.tables, device)
    weight = to(random_weight(m, d, rank=rank, n_bias=n_types, group=2 * group), device)
    x, types = (t.to(device) for t in rows_of(n, d, n_types))
    types[0] = n_types - 1
    mixed = outputs(x, types, tables, weight)
    for kind in types.unique().tolist():
        mine = types == kind
        codes, stats, branch, y = outputs(x, torch.full_like(types, kind), tables, weight)
        assert torch.equal(codes[mine], mixed[0][mine])
        assert torch.equal(stats[:, mine], mixed[1][:, mine])
        assert torch.equal(branch[mine], mixed[2][mine])
        assert int((y[mine] != mixed[3][mine]).sum()) == 0
    again = outputs(x, types, tables, weight)
    assert all(torch.equal(*pair) for pair in zip(mixed, again, strict=True))


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize(
    ("n", "d", "m"), [(280, 96, 40), *([(2050, 576, 1536), (2050, 1536, 576)] if ON_GPU else [])], ids=str
)
def test_bits_do_not_depend_on_how_many_neighbours_there_are(monkeypatch, device, n, d, m, rank):
    """A kernel compiled for other numbers of rows (a multiple of sixteen or not) does its sums in the same order."""
    monkeypatch.setattr(ops, "_failed", {})
    monkeypatch.setattr(ops, "_attempt", lambda name, kernel, fallback: kernel())
    side = input_side(d, rank=rank, n_types=3, channel=False)
    tables = to(side.tables, device)
    weight = to(random_weight(m, d, rank=rank, n_bias=3), device)
    x, types = (t.to(device) for t in rows_of(n, d, 3))
    every = outputs(x, types, tables, weight)
    for chosen in (types == 1, torch.arange(n, device=device) < n - n % 16 - 16):
        some = outputs(x[chosen], types[chosen], tables, weight)
        assert torch.equal(some[0], every[0][chosen])
        assert torch.equal(some[1], every[1][:, chosen])
        assert int((some[3] != every[3][chosen]).sum()) == 0
