"""The map changes nothing before rounding: each part alone, all together, each type, mixed batches (float64)."""

import itertools

import pytest
import torch

from optimum_freeact.numerics.hadamard import random_orthogonal
from optimum_freeact.numerics.kronecker import factor_pair
from optimum_freeact.transforms.affine_map import InputMap, pick


D, OUT, RANK = 24, 10, 3
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def part(name):
    a, b = factor_pair(D)
    double = {"dtype": torch.float64}
    return {
        "mean": lambda: {"mean": 5 * torch.randn(2, D, **double)},
        "shared": lambda: {"mean": 5 * torch.randn(1, D, **double)},
        "scale": lambda: {"channel_scale": torch.rand(D, **double) + 0.1},
        "basis": lambda: {"basis": torch.linalg.qr(torch.randn(D, RANK, **double))[0]},
        "loose basis": lambda: {"basis": torch.randn(D, RANK, **double)},  # as stored: rounded, not orthonormal
        "kronecker": lambda: {"left": torch.randn(a, a, **double), "right": torch.randn(b, b, **double)},
        "dense": lambda: {"dense": torch.randn(D, D, **double)},
    }[name]()


PARTS = ("mean", "shared", "scale", "basis", "loose basis", "kronecker", "dense")
TOGETHER = [*itertools.product(("mean", "shared"), ("scale",), ("basis", "loose basis"), ("kronecker", "dense"))]
BUNDLES = [(), *((name,) for name in PARTS), *TOGETHER]


def build(names):
    found = {}
    for name in names:
        found |= part(name)
    return InputMap(**found)


def output(found, x, types, weight, bias):
    z, p = found.apply(x, types)
    v, low_rank = found.transform_weight(weight)
    y = z @ v.mT
    if p is not None:
        y = y + p @ low_rank.mT
    if found.mean is None:
        return y + bias
    return y + pick(found.mean @ weight.mT + bias, types)


@pytest.mark.parametrize("names", BUNDLES, ids="+".join)
@pytest.mark.parametrize("kinds", ["text", "sink", "mixed", "unknown"])
def test_output_is_what_it_was(names, kinds):
    found = build(names)
    x, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((2, 7, D), (OUT, D), (OUT,)))
    x[:, 0] *= 1e3
    types = {
        "text": torch.zeros(2, 7, dtype=torch.long),
        "sink": torch.ones(2, 7, dtype=torch.long),
        "mixed": (torch.arange(14).view(2, 7) % 3 == 0).long(),
        "unknown": None,
    }[kinds]
    assert (output(found, x, types, weight, bias) - (x @ weight.mT + bias)).abs().max() < 1e-8 * x.abs().max()


@pytest.mark.parametrize("names", [names for names in BUNDLES if names], ids="+".join)
def test_each_part_does_something(names):
    x = torch.randn(5, D, dtype=torch.float64)
    z, p = build(names).apply(x, None)
    assert p is not None or not torch.allclose(z, x)


@pytest.mark.parametrize("names", BUNDLES, ids="+".join)
def test_weight_and_back(names):
    found, weight = build(names), torch.randn(OUT, D, dtype=torch.float64)
    torch.testing.assert_close(found.restore_weight(*found.transform_weight(weight)), weight, **CLOSE)


def test_the_weight_reads_nothing_where_the_rounded_input_has_nothing():
    basis, weight = part("basis")["basis"], torch.randn(OUT, D, dtype=torch.float64)
    turn = random_orthogonal(D, torch.Generator())
    v, _ = InputMap(basis=basis, dense=turn).transform_weight(weight)
    inside = basis.mT @ turn  # the branch's directions in the rounded coordinates
    assert (v @ inside.mT).abs().max() < 1e-12
    assert v.square().sum() < weight.square().sum() * (1 - 1e-3)  # so that rounding noise there does no harm


@pytest.mark.parametrize("names", BUNDLES, ids="+".join)
def test_moments_of_z_from_those_of_x(names):
    found = build([name for name in names if name not in ("mean", "shared")])
    x, y = torch.randn(2, 50, D, dtype=torch.float64)
    z, w = found.apply(x, None)[0], found.apply(y, None)[0]
    torch.testing.assert_close(found.transform_moments(x.mT @ x), z.mT @ z, **CLOSE)
    torch.testing.assert_close(found.transform_moments(y.mT @ x), w.mT @ z, **CLOSE)


def test_types_pick_rows_in_any_shape():
    table, types = torch.randn(3, 4), torch.tensor([[0, 2], [1, 1]])
    assert torch.equal(pick(table, types), table[types])
    assert torch.equal(pick(table[:2], types.clamp(max=1)), table[types.clamp(max=1)])
    assert torch.equal(pick(table[:1], types), table[0])
    assert torch.equal(pick(table, None), table[0])


def test_a_mixed_batch_equals_its_types_one_by_one():
    found, x = build(("mean", "scale", "basis", "kronecker")), torch.randn(6, D, dtype=torch.float64)
    types = torch.tensor([0, 1, 1, 0, 1, 0])
    mixed = found.apply(x, types)
    for kind in (0, 1):
        alone = found.apply(x, torch.full((6,), kind))
        for a, b in zip(mixed, alone):
            assert torch.equal(a[types == kind], b[types == kind])
