"""The kernels in C against their specification, and quantized models that run them."""

import logging

import pytest
import torch

from optimum_freeact.kernels import native, reference
from optimum_freeact.kernels.tables import make_native_tables
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.numerics.affine import choose_qparams, quantize
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


def values_of(rows, d, group):
    """What rounded rows stand for, float64, in natural order of the columns."""
    scale, offset, _ = rows.stats.double()
    spread = [stat.reshape(len(stat), -1).repeat_interleave(group or d, 1)[:, :d] for stat in (scale, offset)]
    return reference.join_columns(rows.codes).double() * spread[0] + spread[1]


@needs_compiler
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("d", "group"), [(576, 32), (576, 16), (192, 64), (96, 32), (96, 48), (4864, 16), (80, 32), (80, 16)]
)
def test_groups_are_rounded_on_grids_of_their_own(d, group, symmetric):
    side, tables = native_side(d, symmetric=symmetric)
    x, types = rows_of(5, d)
    z, p = side.found.to(torch.float64).apply(x.double(), types)
    rows = native.NativeSide(tables, group).round_rows(x, types)
    clip = side.clip.double()[types][:, None]
    totals = []
    for g, columns in enumerate(z.split(group, 1)):
        qparams = choose_qparams(columns, 4, symmetric, clip)
        codes = reference.join_columns(rows.codes)[:, g * group : (g + 1) * group]
        off = (codes - quantize(columns, qparams, 4)).abs()
        assert off.max() <= 1
        assert off.mean() < 0.01
        torch.testing.assert_close(rows.stats[0, :, g].double(), qparams.scale[:, 0], rtol=1e-4, atol=1e-5)
        if not symmetric:
            torch.testing.assert_close(rows.stats[1, :, g].double(), qparams.offset[:, 0], rtol=1e-4, atol=1e-4)
        totals.append(codes.sum(1))
    assert torch.equal(rows.stats[2], torch.stack(totals, 1).float())
    torch.testing.assert_close(rows.branch[:, : p.shape[1]].double(), p, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "m", "d", "group", "weight_group"),
    [(1, 40, 96, 32, 32), (11, 70, 576, 16, 32), (1, 33, 80, 16, None), (2, 64, 4864, 16, 32), (3, 40, 96, 48, None), (9, 130, 576, 32, 32), (13, 50, 192, None, 64), (3, 33, 192, 64, None), (2, 16, 80, 32, None),
     (3, 64, 4864, 32, 32), (1, 40, 80, None, None)],
)  # fmt: skip
def test_whole_linears_are_what_their_codes_stand_for(n, m, d, group, weight_group, out_dtype, bits):
    """Grids of groups on either side, several linears at once; and each group's product is exact before it is scaled."""
    side, tables = native_side(d, bits=bits)
    x, types = rows_of(n, d)
    x = x.to(out_dtype)
    side_c, weights, want = native.NativeSide(tables, group), [], []
    rows = side_c.round_rows(x, types)
    values = values_of(rows, d, group)
    for seed in range(2):
        weight = random_weight(m + seed, d, seed=seed)
        scales = None if weight_group is None else torch.randint(-127, 128, (m + seed, d // weight_group))
        weights.append(native.NativeWeight(weight, None if scales is None else scales.to(torch.int8)))
        dense = unpack(weight.packed.unsqueeze(1), 4, d, torch.int8).flatten(1).double()
        if scales is not None:
            dense = dense * scales.double().repeat_interleave(weight_group, 1)
        y = values @ (dense * weight.qscale.double()[:, None]).mT
        p = rows.branch[:, : tables.rank].double() * weight.low_rank_scale.double()
        want.append(y + p @ weight.low_rank.double().mT + weight.type_bias.double()[types])
    got = side_c.linears(x.view(1, n, d), types.view(1, n), weights)
    for a, b in zip(got, want, strict=True):
        assert a.shape == (1, n, b.shape[1])
        assert a.dtype == out_dtype
        assert distance(a[0], b) <= max(2e-6, torch.finfo(out_dtype).eps)
    again = side_c.linears(x, types, weights[1:])[0]
    assert torch.equal(again, got[1][0])


@needs_compiler
def test_rows_do_not_depend_on_how_many_there_are():
    side, tables = native_side(576)
    x, types = rows_of(19, 576)
    weight = native.NativeWeight(random_weight(70, 576), torch.ones(70, 18, dtype=torch.int8))
    side_c = native.NativeSide(tables, 32)
    whole = side_c.linears(x, types, [weight])[0]
    single = torch.cat([side_c.linears(x[i : i + 1], types[i : i + 1], [weight])[0] for i in range(19)])
    assert torch.equal(whole, single)
    assert side_c.linears(x[:0], types[:0], [weight])[0].shape == (0, 70)
    x[3, 5] = float("nan")
    assert side_c.linears(x, types, [weight])[0].isnan().all(1).nonzero().flatten().tolist() == [3]


@needs_compiler
def test_linears_of_one_input_run_together_and_once(monkeypatch):
    model, calls = quantized(), []
    linears = native.NativeSide.linears
    monkeypatch.setattr(
        native.NativeSide, "linears", lambda self, x, *args: calls.append(len(args[1])) or linears(self, x, *args)
    )
    block = model.model.layers[0]
    x = torch.randn(1, 2, 64)
    with torch.no_grad():
        first = [m(x) for m in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)]
        assert calls == [3]
        again = [m(x) for m in (block.self_attn.v_proj, block.self_attn.q_proj)]
        assert calls == [3, 3]
        assert torch.equal(again[0], first[2])
        x.mul_(2)  # changed in place: what was made before is of no use
        assert not torch.equal(block.self_attn.k_proj(x), first[1])
        assert calls == [3, 3, 3]
    with torch.inference_mode():  # where nobody can tell whether a tensor was changed
        y = torch.randn(1, 2, 64)
        block.self_attn.q_proj(y), block.self_attn.k_proj(y)
        assert calls == [3, 3, 3, 1, 1]


@needs_compiler
@pytest.mark.parametrize(
    "settings",
    [{}, {"activation_bits": 8}, {"preset": "quarot"}, {"preset": "freeact-fast"}],
    ids=["freeact", "a8", "quarot", "fast"],
)
def test_models_compute_the_same(settings, monkeypatch):
    monkeypatch.setenv("FREEACT_KERNELS", "torch")
    model = quantized(**settings)
    plain = logits(model)
    monkeypatch.setenv("FREEACT_KERNELS", "native")
    for module in model.modules():
        if isinstance(module, (FreeActInput, FreeActLinear)):
            module.prepare()
    assert all(m._native is not None for m in model.modules() if isinstance(m, FreeActLinear))
    again = logits(model)
    assert distance(again, plain) < 0.5 * distance(plain, logits(tiny("llama")))


@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
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


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="models are calibrated on the GPU here, and the kernel in C is for CPUs"
)
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
        model = quantized("llama", preset="freeact-fast")
        assert all(m._codes is not None for m in model.modules() if isinstance(m, FreeActLinear))
        assert not list(tmp_path.rglob("*.so"))
        monkeypatch.setenv("FREEACT_KERNELS", "native")
        with pytest.raises(ValueError, match=f"FREEACT_KERNELS=native.*{message}"):
            quantized()
    finally:
        native._library.cache_clear()
