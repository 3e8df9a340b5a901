"""The kernel in Gluon against its specification (on a Hopper GPU), and when it is chosen (anywhere)."""

import pytest
import torch

from optimum_freeact.kernels import dispatch, ops, reference
from tests.freeact.kernels.cases import of_several_linears, random_weight, to


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="Gluon has no interpreter: this kernel needs a Hopper GPU")


def rounded_rows(n: int, d: int, rank: int, bits: int = 4, seed: int = 3) -> reference.Rows:
    generator = torch.Generator().manual_seed(seed)
    top = 1 << (bits - 1)
    codes = torch.randint(-top, top, (n, d), generator=generator)
    scale, offset = torch.rand(n, generator=generator) * 0.1, torch.randn(n, generator=generator) * 0.1
    branch = torch.randn(n, 32, generator=generator) if rank else None
    if rank:
        branch[:, rank:] = 0
    return reference.Rows(codes.to(torch.int8), torch.stack((scale, offset, codes.sum(1).float())), branch)


def check(module, n, d, m, *, rank=24, n_bias=2, bits=4, dtype=torch.bfloat16, group=None, several=False):
    """`group` of the weight, 0 for none, makes the rows values instead of codes."""
    rows, weight = rounded_rows(n, d, rank, bits), random_weight(m, d, rank=rank, n_bias=n_bias, group=group or 0)
    if group is not None:
        values = torch.randn(n, d, generator=torch.Generator().manual_seed(5)).half()
        rows = rows._replace(codes=values, stats=rows.stats[:1])
        weight = weight._replace(qscale=weight.qscale / 60)  # within float16
    weight = of_several_linears(weight) if several else weight
    types = torch.randint(0, max(1, n_bias), (n,), generator=torch.Generator().manual_seed(4))
    want = reference.w4_linear(rows, types, weight, torch.float64, torch.float64)
    rows = reference.marked(rows, types, rank, n_bias)
    given = to(rows, "cuda"), types.cuda(), to(weight, "cuda"), dtype
    first = module.w4_linear(*given)
    assert first.dtype == dtype
    assert float((first.double().cpu() - want).norm() / want.norm()) < 3e-3  # one rounding to bfloat16
    for _ in range(5):
        assert torch.equal(module.w4_linear(*given), first)


PARTS = [{}, {"rank": 0}, {"n_bias": 0}, {"n_bias": 1}, {"n_bias": 5}, {"rank": 0, "n_bias": 0}, {"bits": 8}]


@needs_hopper
@pytest.mark.parametrize(("n", "d", "m"), [(65, 256, 136), (128, 512, 256), (1000, 1024, 4104), (2048, 2304, 6144)])
def test_many_rows(n, d, m):
    from optimum_freeact.kernels import w4_hopper

    check(w4_hopper, n, d, m)


@needs_hopper
@pytest.mark.parametrize("options", PARTS, ids=str)
def test_every_part_may_be_absent(options):
    from optimum_freeact.kernels import w4_hopper

    check(w4_hopper, 300, 512, 520, **options)
    check(w4_hopper, 300, 512, 520, dtype=torch.float16, **options)


@needs_hopper
@pytest.mark.parametrize("group", [None, 0, 32])
def test_several_linears_as_one(group):
    from optimum_freeact.kernels import w4_hopper

    check(w4_hopper, 300, 512, 1536, group=group, several=True)


@needs_hopper
@pytest.mark.parametrize("options", [{}, {"rank": 0}, {"n_bias": 0}, {"n_bias": 5}, {"dtype": torch.float16}], ids=str)
@pytest.mark.parametrize("group", [0, 16, 32, 64])
def test_values_meet_groups(options, group):
    from optimum_freeact.kernels import w4_hopper

    check(w4_hopper, 300, 512, 520, group=group, **options)


@needs_hopper
def test_what_is_not_finite_touches_no_other_row():
    from optimum_freeact.kernels import w4_hopper

    n = 300
    rows, weight = rounded_rows(n, 512, 24), random_weight(520, 512, rank=24)
    rows.stats[:2, 3] = float("nan")
    y = w4_hopper.w4_linear(to(rows, "cuda"), None, to(weight, "cuda"), torch.bfloat16).cpu()
    assert y.isnan().all(1).nonzero().flatten().tolist() == [3]
    assert y.isfinite().all(1).sum() == n - 1


@needs_hopper
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("n", [1, 5, 16, 40, 1500])
def test_a_captured_step_follows_its_input(monkeypatch, n, group):
    """Rounding and products in one CUDA graph, kernels starting before the ones they wait for have ended."""
    from tests.freeact.kernels.cases import input_side, rows_of

    monkeypatch.setattr(ops, "_failed", {})
    d, m = 1024, 4104
    side = input_side(d, rank=24, channel=False, group=group)
    weight = to(random_weight(m, d, rank=24, group=2 * group), "cuda")
    tables = to(side.tables, "cuda")
    x, types = (t.cuda() for t in rows_of(n, d))

    def step(rows):
        found = ops.round_rows(rows, types, *tables.tensors(), tables.a, tables.b, 4, False, tables.group)
        return ops.w4_linear(*found, types, *weight, torch.bfloat16)

    ops.make_ready(x.device)
    inputs = [torch.randn_like(x) for _ in range(4)]
    wanted = [step(each) for each in inputs]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step(x) for _ in range(3)]
    for each, want in zip(inputs, wanted, strict=True):
        x.copy_(each)
        graph.replay()
        for y in kept:
            assert torch.equal(y, want)
    assert ops.failures() == {}


@pytest.mark.parametrize(
    ("n", "m", "half", "branch", "dtype", "choice"),
    [
        (2048, 4096, 2048, 32, torch.bfloat16, "w4_hopper"),
        (65, 65536, 2048, 0, torch.float16, "w4_hopper"),
        (64, 65536, 2048, 32, torch.bfloat16, None),
        (300, 1024, 2048, 32, torch.bfloat16, None),  # too few tiles
        (0, 4096, 2048, 32, torch.bfloat16, None),
        (2048, 4096, 2048, 32, torch.float32, None),
        (2048, 4092, 2048, 32, torch.bfloat16, None),
        (2048, 4096, 288, 32, torch.bfloat16, None),
        (2048, 4096, 2048, 128, torch.bfloat16, None),
    ],
)
def test_which_kernel_is_chosen_on_hopper(n, m, half, branch, dtype, choice):
    assert dispatch.hopper_choice(n, m, half, branch, dtype) == choice
    assert dispatch.hopper_choice(n, m, half, branch, dtype, 16) == choice
    assert dispatch.hopper_choice(n, m, half, branch, dtype, 64) is None


def test_other_devices_never_see_it():
    rows, weight = rounded_rows(1, 256, 0), random_weight(136, 256, rank=0)
    assert dispatch.hopper_kernel(rows, weight, torch.bfloat16) is None
