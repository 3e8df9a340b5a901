"""The operators around the kernels, and quantized modules that run them."""

import logging

import pytest
import torch

from optimum_freeact.kernels import dispatch, ops, reference
from optimum_freeact.modules import activation, linear
from tests.freeact.kernels.cases import input_side, random_weight, rows_of
from tests.helpers.quantized import distance, quantized


@pytest.fixture
def no_failures(monkeypatch):
    monkeypatch.setattr(ops, "_failed", {})


def arguments(d=96, n=5, group=0):
    side = input_side(d, group=group)
    x, types = rows_of(n, d)
    return side, (x, types, *side.tables.tensors(), side.tables.a, side.tables.b, 4, False, side.tables.group)


def test_a_kernel_that_fails_is_replaced_once_with_one_warning(monkeypatch, no_failures, caplog, device):
    from optimum_freeact.kernels import rounding_triton

    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("out of registers\nlong story")

    monkeypatch.setattr(rounding_triton, "round_rows", broken)
    side, args = arguments()
    with caplog.at_level(logging.WARNING):
        first, second = ops.round_rows(*args), ops.round_rows(*args)
    want = reference.round_rows(args[0], args[1], side.found, side.clip, 4, False, side.tables.branch)
    assert len(calls) == 1
    assert len(caplog.records) == 1
    assert "round_rows[8x12]" in caplog.text
    assert "out of registers" in caplog.text
    assert "long story" not in caplog.text
    assert ops.failures() == {"round_rows[8x12]": "RuntimeError: out of registers"}
    for got in (first, second):
        assert (got[0].int() - want.codes.int()).abs().float().mean() < 0.01


def test_running_out_of_memory_is_no_failure_of_a_kernel(monkeypatch, no_failures, device):
    from optimum_freeact.kernels import rounding_triton

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(rounding_triton, "round_rows", full)
    with pytest.raises(torch.OutOfMemoryError):
        ops.round_rows(*arguments()[1])
    assert ops.failures() == {}


@pytest.mark.parametrize("group", [0, 16])
def test_operators_keep_torchs_contract(no_failures, device, group):
    _, args = arguments(group=group)
    torch.library.opcheck(ops.round_rows_op, args, test_utils=("test_schema", "test_faketensor"))
    codes, stats, branch = ops.round_rows(*args)
    weight = random_weight(20, 96, group=2 * group)
    torch.library.opcheck(
        ops.w4_linear_op,
        (codes, stats, branch, args[1], *weight, torch.bfloat16),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.fixture
def with_triton(monkeypatch, no_failures, device):
    """Modules on the CPU use Triton's interpreter as they would use the GPU."""

    def plan(where, **layer):
        obstacle = dispatch.layer_obstacle(**layer)
        return dispatch.Plan("torch" if obstacle else "triton", "product", obstacle or "test")

    monkeypatch.setattr(activation, "plan", plan)
    monkeypatch.setattr(linear, "plan", plan)
    monkeypatch.setattr(
        ops, "_attempt", lambda name, kernel, fallback: kernel()
    )  # a failing kernel must fail the test here


@pytest.mark.skipif(torch.cuda.is_available(), reason="covered on the GPU by the kernels' own tests")
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "freeact-fast"},
        {"preset": "freeact-fast", "activation_bits": 8},
        {"preset": "quarot"},
        {"preset": "freeact-fast", "low_rank": 0, "centring": "none"},
        {"preset": "freeact-fastest"},
        {"preset": "freeact-fastest", "transform": "kronecker", "channel_scale": "closed_form"},
        {"preset": "freeact"},
        {"preset": "freeact", "activation_group_size": None},
        {"preset": "freeact-fast", "activation_group_size": 16},
        {"preset": "freeact", "activation_bits": 8},
    ],
    ids=[
        "fast",
        "a8",
        "quarot",
        "bare",
        "fastest",
        "fitted factors",
        "groups",
        "weight groups",
        "activation groups",
        "groups a8",
    ],
)
def test_modules_compute_the_same_with_kernels(settings, monkeypatch, request):
    monkeypatch.setenv("FREEACT_KERNELS", "torch")
    block = quantized(**settings).model.layers[0]
    x = torch.randn(2, 3, 64)
    layers = (block.self_attn.q_proj, block.self_attn.v_proj)
    plain = [layer(x) for layer in layers]
    request.getfixturevalue("with_triton")
    for module in (*layers, layers[0].source):
        module.prepare()
    assert all(layer._codes is None for layer in layers)
    assert layers[0].source._tables is not None
    for layer, before in zip(layers, plain, strict=True):
        after = layer(x)
        assert not torch.equal(after, before)  # the kernels did run
        assert distance(after, before) < 0.05  # codes on an edge may fall to the other side


def test_the_environment_decides(monkeypatch):
    layer = {"weight_bits": 4, "activation_bits": 4, "group_size": None, "transform": "hadamard", "width": 64}
    monkeypatch.setenv(dispatch.ENVIRONMENT, "torch")
    assert dispatch.plan("cpu", **layer).name == "torch"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="'fast'.*auto"):
        dispatch.plan("cpu", **layer)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    with pytest.raises(ValueError, match="device type 'cpu'"):
        dispatch.plan("cpu", **layer)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((32, 16), None),
        ((16, None), None),
        ((None, 6), None),
        ((48, 16), "weight_group_size=48"),
        ((8, 16), "weight_group_size=8"),
        ((32, 9), "activation_group_size=9"),
    ],
)
def test_which_groups_the_kernels_for_gpus_take(sizes, reason):
    layer = {"weight_bits": 4, "activation_bits": 4, "transform": "hadamard", "width": 2016}
    found = dispatch.layer_obstacle(**layer, group_size=sizes[0], activation_group_size=sizes[1])
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight_bits": 8}, "weight_bits=8"),
        ({"activation_bits": 16}, "activation_bits=16"),
        ({"group_size": 16}, "weight_group_size=16"),
        ({"activation_group_size": 8}, "activation_group_size=8"),
        ({"transform": "orthogonal"}, "transform='orthogonal'"),
        ({"width": 72}, "in_features=72"),
        ({"width": 1184}, "32 x 37"),
        ({"masked": True}, "coordinates or directions of their own"),
    ],
)
def test_what_kernels_do_not_serve_is_told(change, reason):
    layer = {"weight_bits": 4, "activation_bits": 4, "group_size": None, "transform": "hadamard", "width": 64}
    assert dispatch.layer_obstacle(**layer) is None
    found = dispatch.plan("cpu", **{**layer, **change})
    assert found.name == "torch"
    assert reason in found.reason
