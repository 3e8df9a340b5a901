"""The kernels in C against their specification, and quantized models that run them."""

import logging

import pytest
import torch

from optimum_freeact.kernels import native, reference
from optimum_freeact.kernels.tables import make_native_tables
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.numerics.packing import unpack
from tests.freeact.kernels.cases import input_side, random_weight, rows_of
from tests.freeact.kernels.test_w4_triton import random_rows
from tests.helpers.quantized import distance, logits, quantized
from tests.helpers.tiny_models import tiny


needs_compiler = pytest.mark.skipif(native.obstacle() is not None, reason=f"no kernel in C: {native.obstacle()}")


def native_side(d, **options):
    side = input_side(d, **options)
    rank = side.tables.rank
    codes = side.tables.basis[:rank].to(torch.int8).mT.contiguous() if rank else None
    tables = make_native_tables(
        side.found, codes, side.tables.basis_scale, side.clip, side.tables.bits, side.tables.symmetric
    )
    return side, tables


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("d", "options"),
    [(576, {}), (96, {"rank": 0}), (4864, {"rank": 24}), (192, {"n_types": 5, "bits": 8}), (192, {"symmetric": True}),
     (80, {"means": False, "channel": False, "n_types": 1})],
)  # fmt: skip
def test_rows_are_rounded_as_specified(d, options, dtype):
    side, tables = native_side(d, **options)
    x, types = rows_of(5, d, options.get("n_types", 2))
    x = x.to(dtype)
    arguments = (side.tables.bits, side.tables.symmetric, side.tables.branch)
    want = reference.round_rows(x.double(), types, side.found, side.clip, *arguments, torch.float64)
    got = native.round_rows(x, types, tables)
    off = (got.codes.int() - want.codes.int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 1e-3  # float32 sums in another order
    torch.testing.assert_close(got.stats[:2].double(), want.stats[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.stats[2], got.codes.sum(1).float())
    if tables.rank:
        torch.testing.assert_close(got.branch.double(), want.branch, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 40, 96), (5, 130, 4864), (8, 64, 64), (3, 7, 176)])
def test_products_are_exact_integers_in_the_worst_case_too(n, m, d, bits):
    weight = random_weight(m, d, rank=0, n_bias=0)._replace(qscale=torch.ones(m))
    rows = random_rows(n, d, rank=0, bits=bits)
    rows.codes[0] = -(1 << (bits - 1))
    weight.packed[0], weight.packed[1] = 0, 255  # all codes -8, all codes 7
    sums = unpack(weight.packed.unsqueeze(1), 4, d, torch.int8).flatten(1).sum(1, dtype=torch.int32)
    stats = torch.stack((torch.ones(n), torch.zeros(n), rows.codes.sum(1).float()))
    rows, weight = rows._replace(stats=stats), weight._replace(row_sum=sums)
    got = native.w4_linear(rows, None, weight, torch.float32, bits)
    assert torch.equal(got.double(), reference.w4_linear(rows, None, weight, torch.float64, torch.float64))


@needs_compiler
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "n_bias"), [(4, 2), (0, 2), (4, 0), (4, 1), (0, 5)])
def test_everything_that_follows(rank, n_bias, out_dtype):
    weight, rows = random_weight(50, 160, rank=rank, n_bias=n_bias), random_rows(7, 160, rank=rank)
    types = torch.arange(7) % max(n_bias, 1)
    got = native.w4_linear(rows, types, weight, out_dtype, 4)
    want = reference.w4_linear(rows, types, weight, torch.float64, torch.float64)
    assert distance(got, want) <= max(1e-6, torch.finfo(out_dtype).eps)
    assert torch.equal(got, native.w4_linear(rows, types, weight, out_dtype, 4))


@needs_compiler
def test_what_is_not_finite_stays_so_and_touches_no_other_row():
    _, tables = native_side(96)
    x, types = rows_of(4, 96)
    clean = native.round_rows(x, types, tables)
    x[1, 7], x[3, 50] = float("nan"), float("inf")
    rows = native.round_rows(x, types, tables)
    y = native.w4_linear(rows, types, random_weight(20, 96), torch.bfloat16, 4)
    assert y.isnan().all(1).tolist() == [False, True, False, True]
    assert y.isnan().any(1).tolist() == [False, True, False, True]
    assert torch.equal(rows.codes[[0, 2]], clean.codes[[0, 2]])


@needs_compiler
@pytest.mark.parametrize(
    "settings", [{}, {"activation_bits": 8}, {"preset": "quarot"}], ids=["freeact", "a8", "quarot"]
)
def test_models_compute_the_same(settings, monkeypatch):
    monkeypatch.setenv("FREEACT_KERNELS", "torch")
    plain = logits(quantized(**settings))
    monkeypatch.setenv("FREEACT_KERNELS", "native")
    model = quantized(**settings)
    assert all(m._codes is None for m in model.modules() if isinstance(m, FreeActLinear))
    again = logits(model)
    assert not torch.equal(again, plain)
    assert distance(again, plain) < 0.5 * distance(plain, logits(tiny("llama")))


@needs_compiler
def test_compiles_without_graph_breaks():
    model = quantized()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled, use_cache=False), logits(model, use_cache=False))


@needs_compiler
def test_it_is_built_once(tmp_path, monkeypatch):
    first = native.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    monkeypatch.setattr(native.subprocess, "run", _only_version(native.subprocess.run))
    assert native.build(tmp_path) == first


def _only_version(run):
    def guarded(command, **options):
        assert command[-1] == "--version"
        return run(command, **options)

    return guarded


@pytest.mark.parametrize(
    ("compiler", "message"), [("false", "false failed"), ("no-such-compiler-here", "no-such-compiler-here")]
)
def test_without_a_compiler_torch_runs(compiler, message, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert message in native.obstacle()
        model = quantized()
        assert all(m._codes is not None for m in model.modules() if isinstance(m, FreeActLinear))
        assert not list(tmp_path.rglob("*.so"))
        monkeypatch.setenv("FREEACT_KERNELS", "native")
        with pytest.raises(ValueError, match=f"FREEACT_KERNELS=native.*{message}"):
            quantized()
    finally:
        native._library.cache_clear()
