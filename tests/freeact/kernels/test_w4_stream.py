"""The product of few rows as a stream of weights, against its specification on a Hopper GPU, and when it is chosen."""

import pytest
import torch

from optimum_freeact.kernels import dispatch, reference
from tests.freeact.kernels.cases import of_several_linears, random_weight, to
from tests.freeact.kernels.test_hopper import needs_hopper
from tests.freeact.kernels.test_w4_triton import random_rows


def kernel():
    from optimum_freeact.kernels import w4_stream

    return w4_stream.w4_linear


@needs_hopper
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "d", "m"),
    [(1, 4096, 4104), (7, 14336, 512), (16, 4096, 14336), (16, 256, 40), (5, 2304, 33), (32, 2048, 64)],
)
def test_products_are_exact_integers(n, d, m, bits):
    """With unit scales and no offset the output is the integer product itself, worst cases included."""
    weight = random_weight(m, d, rank=0, n_bias=0)._replace(qscale=torch.ones(m))
    rows = random_rows(n, d, rank=0, bits=bits)
    rows.codes[0] = -(1 << (bits - 1))
    weight.packed[0] = 0  # all codes -8
    rows.stats[0], rows.stats[1], rows.stats[2] = 1, 0, rows.codes.sum(1)
    got = kernel()(to(rows, "cuda"), None, to(weight, "cuda"), torch.float32)
    assert torch.equal(got.cpu().long(), reference.w4_product(rows.codes, weight.packed))


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rank", "n_bias", "several"), [(0, 0, False), (0, 3, False), (24, 2, False), (48, 4, True), (4, 1, True)]
)
def test_everything_that_follows(rank, n_bias, several, dtype):
    n, d, m = 13, 4096, 768
    weight = random_weight(m, d, rank=rank, n_bias=n_bias)
    weight = of_several_linears(weight) if several else weight
    rows = random_rows(n, d, rank=rank, width=64)
    types = torch.randint(0, max(1, n_bias), (n,), generator=torch.Generator().manual_seed(4)) if n_bias > 1 else None
    want = reference.w4_linear(rows, types, weight, torch.float64, torch.float64)
    given = to(rows, "cuda"), None if types is None else types.cuda(), to(weight, "cuda"), dtype
    first = kernel()(*given)
    assert first.dtype == dtype
    bar = 2e-5 if dtype == torch.float32 else 3e-3
    assert float((first.double().cpu() - want).norm() / want.norm()) < bar
    for _ in range(5):
        assert torch.equal(kernel()(*given), first)


@needs_hopper
def test_a_row_does_not_see_the_others():
    d, m = 4096, 512
    weight, rows = to(random_weight(m, d, rank=24), "cuda"), to(random_rows(16, d, rank=24, width=32), "cuda")
    types = torch.arange(16, device="cuda") % 2
    whole = kernel()(rows, types, weight, torch.bfloat16)
    rows.stats[0, 3] = rows.stats[1, 3] = float("nan")
    other = kernel()(rows, types, weight, torch.bfloat16)
    assert other[3].isnan().all()
    kept = [i for i in range(16) if i != 3]
    assert torch.equal(other[kept], whole[kept])
    for count in (9, 12):  # of the same tile
        fewer = reference.Rows(rows.codes[:count], rows.stats[:, :count].contiguous(), rows.branch[:count])
        assert torch.equal(kernel()(fewer, types[:count], weight, torch.bfloat16)[:3], whole[:3])


@needs_hopper
@pytest.mark.parametrize("n", [2, 16])
def test_the_same_bits_as_the_product_that_runs_elsewhere(n):
    """Whole numbers, and the same steps after them where there is no branch."""
    from optimum_freeact.kernels import w4_triton

    weight, rows = to(random_weight(512, 4096, rank=0), "cuda"), to(random_rows(n, 4096, rank=0), "cuda")
    types = torch.arange(n, device="cuda") % 2
    given = rows, types, weight, torch.float32
    assert float((kernel()(*given) - w4_triton.w4_linear(*given)).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("n", "m", "d", "n_bias", "chosen"),
    [
        (3, 4096, 4096, 2, True),
        (32, 2048, 4096, 0, True),
        (2, 14336, 4096, 2, True),
        (2, 4096, 4096, 2, False),  # plain cores
        (1, 14336, 4096, 2, False),
        (1, 4096, 14336, 2, True),  # long rows
        (33, 14336, 4096, 2, False),
        (0, 14336, 4096, 2, False),
        (16, 1024, 4096, 2, False),  # too little work
        (16, 14336, 4096, 5, False),  # more types than it selects
        (16, 14336, 4864 - 128, 2, False),  # no whole pieces
    ],
)
def test_when_it_is_chosen(monkeypatch, n, m, d, n_bias, chosen):
    weight = random_weight(4, 32, rank=0, n_bias=n_bias)._replace(
        packed=torch.empty(m, d // 2, dtype=torch.uint8, device="meta")
    )
    assert dispatch.stream_choice(n, weight) is chosen
    monkeypatch.setattr(dispatch, "is_hopper", lambda index: True)
    codes = torch.empty(n, d, dtype=torch.int8, device="meta")

    class OnGpu:
        is_cuda, device, dtype = True, torch.device("cuda", 0), codes.dtype

        def __len__(self):
            return n

    rows = reference.Rows(OnGpu(), None, None)
    assert (dispatch.hopper_kernel(rows, weight, torch.bfloat16) == "w4_stream") is chosen


def test_equal_runs_cover_the_weight():
    pytest.importorskip("triton.experimental.gluon")
    from optimum_freeact.kernels import w4_stream

    for m, half in ((14336, 2048), (4096, 7168), (4096, 2048), (6144, 2048), (28672, 2048), (33, 128)):
        for whole in (0.8, 9.0):
            per, programs = w4_stream.runs(m, half, 132, whole)
            pieces = -(-m // 128) * (half // 128)
            assert programs <= 132
            assert (programs - 1) * per < pieces <= programs * per
    assert w4_stream.runs(14336, 2048, 132, 0.8) == (16, 112)  # a block of outputs each, and no sums
    assert w4_stream.runs(14336, 2048, 132, 9.0) == (14, 128)
