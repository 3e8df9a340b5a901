"""Triton's products with packed weights against their specification: integers exactly, the rest to float32's last bits."""

import pytest
import torch

from optimum_freeact.kernels import reference
from optimum_freeact.numerics.packing import unpack
from tests.freeact.kernels.cases import of_several_linears, random_weight, to


def random_rows(n, d, rank=4, width=16, bits=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    top = 1 << (bits - 1)
    codes = torch.randint(-top, top, (n, d), dtype=torch.int8, generator=generator)
    stats = torch.randn(3, n, generator=generator)
    stats[2] = codes.sum(1)
    branch = torch.zeros(n, width)
    branch[:, :rank] = torch.randn(n, rank, generator=generator)
    return reference.Rows(codes, stats, branch if rank else None)


def product(name):
    from optimum_freeact.kernels import dp4a_triton, w4_triton

    return {"mma": w4_triton.w4_linear, "dp4a": dp4a_triton.w4_linear}[name]


def both(device, name, rows, types, weight, **options):
    rank, n_bias = (0 if t is None else t.shape[d] for t, d in ((weight.low_rank, 1), (weight.type_bias, 0)))
    rows = reference.marked(rows, types, rank, n_bias)
    got = product(name)(
        to(rows, device), None if types is None else types.to(device), to(weight, device), torch.float32, **options
    )
    return got.cpu().double(), reference.w4_linear(rows, types, weight, torch.float64, torch.float64)


def test_split_columns_meet_the_nibbles():
    weight = random_weight(5, 32)
    codes = torch.arange(64, dtype=torch.int8).reshape(2, 32)
    dense = unpack(weight.packed.unsqueeze(1), 4, 32, torch.int8).flatten(1)
    assert torch.equal(reference.join_columns(reference.split_columns(codes)), codes)
    assert torch.equal(
        reference.w4_product(reference.split_columns(codes), weight.packed).long(), codes.long() @ dense.long().mT
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("name", "n", "m", "d"),
    [
        ("mma", 1, 40, 96), ("mma", 17, 130, 192), ("mma", 3, 64, 1536), ("mma", 70, 33, 112),
        ("dp4a", 1, 40, 96), ("dp4a", 2, 33, 1536), ("dp4a", 4, 7, 176),
    ],
)  # fmt: skip
def test_products_are_exact_integers(device, name, n, m, d, bits):
    """With unit scales and no offset the output is the integer product itself, worst cases included."""
    weight = random_weight(m, d, rank=0, n_bias=0)._replace(qscale=torch.ones(m))
    rows = random_rows(n, d, rank=0, bits=bits)
    rows.codes[0] = -(1 << (bits - 1))
    weight.packed[0] = 0  # all codes -8
    weight = weight._replace(
        row_sum=unpack(weight.packed.unsqueeze(1), 4, d, torch.int8).flatten(1).sum(1, dtype=torch.int32)
    )
    stats = torch.stack((torch.ones(n), torch.zeros(n), rows.codes.sum(1).float()))
    got, want = both(device, name, rows._replace(stats=stats), None, weight)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("rank", "n_bias"), [(4, 2), (0, 2), (4, 0), (0, 0), (4, 1), (0, 5)])
@pytest.mark.parametrize(("name", "n"), [("mma", 20), ("dp4a", 3)])
def test_everything_that_follows(device, name, n, rank, n_bias):
    weight = random_weight(50, 160, rank=rank, n_bias=n_bias)
    rows = random_rows(n, 160, rank=rank)
    types = torch.arange(n) % max(n_bias, 1)
    got, want = both(device, name, rows, types, weight)
    assert (got - want).norm() <= 2e-5 * want.norm()


LARGE = {"BM": 128, "BN": 128, "BK": 64, "registers": None}


@pytest.mark.parametrize("options", [{}, LARGE, {"early": True}], ids=["small tiles", "large tiles", "early"])
@pytest.mark.parametrize(("rank", "n_bias"), [(4, 3), (0, 3), (4, 1)])
def test_everything_that_follows_many_rows(device, rank, n_bias, options):
    weight, rows = random_weight(150, 160, rank=rank, n_bias=n_bias), random_rows(140, 160, rank=rank)
    got, want = both(device, "mma", rows, torch.arange(140) % n_bias, weight, options=options)
    assert (got - want).norm() <= 5e-5 * want.norm()  # what a type's bias adds is right to sixteen bits of it


def test_large_tiles_are_for_products_that_have_many():
    from optimum_freeact.kernels.launches import groups_launch, w4_launch

    for launch in (w4_launch, groups_launch):
        assert launch(2048, 576, 288)["BM"] == 64
        assert launch(2048, 14336, 2048)["BM"] == 128
        assert launch(65, 14336, 2048) == launch(2048, 576, 288)  # more than 64 rows never have their parts summed


@pytest.mark.parametrize(("name", "n"), [("mma", 5), ("dp4a", 1), ("dp4a", 3)])
def test_several_linears_as_one(device, name, n):
    rows, weight = random_rows(n, 96), of_several_linears(random_weight(768, 96))
    got, want = both(device, name, rows, torch.arange(n) % 2, weight)
    assert (got - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("split", [1, 2, 3])
def test_parts_of_a_row_are_summed_exactly_and_again(device, split):
    """Counters are left as they were found, so a second launch (or a graph's replay) is right too."""
    weight, rows = random_weight(70, 640), random_rows(5, 640)
    types = torch.zeros(5, dtype=torch.long)
    results = [both(device, "mma", rows, types, weight, options={"SPLIT": split, "BK": 64}) for _ in range(3)]
    assert all(torch.equal(got, results[0][0]) for got, _ in results)
    assert (results[0][0] - results[0][1]).norm() <= 2e-5 * results[0][1].norm()


@pytest.mark.parametrize("name", ["mma", "dp4a"])
def test_nan_goes_through(device, name):
    weight, rows = random_weight(20, 96), random_rows(3, 96)
    rows.stats[0, 1] = float("nan")
    got, _ = both(device, name, rows, torch.zeros(3, dtype=torch.long), weight)
    assert got.isnan().any(1).tolist() == [False, True, False]
    assert got[1].isnan().all()


def test_no_rows(device):
    got = product("mma")(to(random_rows(0, 96), device), None, to(random_weight(20, 96), device), torch.bfloat16)
    assert got.shape == (0, 20)


@pytest.mark.parametrize(("name", "n"), [("mma", 5), ("dp4a", 1), ("dp4a", 3)])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_mixed_batch_has_the_bits_of_batches_of_one_type(device, name, n, rank):
    rows, weight = random_rows(n, 96, rank=rank), random_weight(40, 96, rank=rank, n_bias=4)
    types = torch.arange(n) % 4 if n > 1 else torch.tensor([3])
    mixed, want = both(device, name, rows, types, weight)
    # what a type's bias adds is right to sixteen bits of it
    assert torch.allclose(mixed, want, rtol=1e-5, atol=1e-4)
    for kind in types.unique().tolist():
        alone, _ = both(device, name, rows, torch.full_like(types, kind), weight)
        assert torch.equal(alone[types == kind], mixed[types == kind])


def test_digits_of_a_types_biases_are_what_they_add():
    """Two bytes a number and a power of two for all: within a part in thirty thousand of the largest."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(4, 300, generator=generator) * torch.tensor([1.0, 1e-3, 0.0, 5e4])[:, None]
    columns = reference.type_columns(bias, True)
    assert columns.dtype == torch.int8
    assert columns.shape == (301, 6)
    found = torch.ldexp(columns[:-1].double(), columns[-1].double()).unflatten(1, (3, 2)).sum(2)
    change = (bias[1:] - bias[0]).mT.double()
    assert ((found - change).abs().amax(0) <= change.abs().amax(0) / 30000).all()
    assert reference.type_columns(bias[:1], True) is None
    assert (reference.type_columns(torch.zeros(2, 8), True)[:-1] == 0).all()


def test_columns_without_a_branch_add_up_to_the_change():
    """Two numbers of eight bits each: within a part in sixty thousand of each number."""
    bias = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    columns = reference.type_columns(bias, False)
    assert columns.dtype == torch.bfloat16
    assert columns.shape == (300, 16)
    assert (columns[:, 6:] == 0).all()
    change = (bias[1:] - bias[0]).mT.double()
    found = columns[:, :6].double().unflatten(1, (3, 2)).sum(2)
    assert ((found - change).abs() <= change.abs() / 60000).all()
    assert reference.type_columns(bias[:1], False) is None


def test_a_branch_is_widened_to_fours_with_zeros():
    wide = reference.in_fours(torch.ones(3, 13))
    assert wide.shape == (3, 16)
    assert wide.sum() == 39
    whole = torch.ones(3, 12)
    assert reference.in_fours(whole) is whole
