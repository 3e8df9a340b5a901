"""The comparison that the kernels for groups pass before a GPU uses them."""

import pytest
import torch

from optimum_freeact.kernels import self_check, w4_groups_triton


def disagreement(device, rows):
    return self_check.disagreement(torch.device(device), lambda *args: None, rows)


def test_kernels_that_agree_pass(device):
    assert disagreement(device, (1, 5)) is None


@pytest.mark.parametrize(
    "wrong", [lambda y: y * 1.02, lambda y: y.roll(1, 1), lambda y: y * float("nan")], ids=["scale", "order", "nan"]
)
def test_a_product_that_is_wrong_is_named(device, monkeypatch, wrong):
    right = w4_groups_triton.w4_linear
    monkeypatch.setattr(w4_groups_triton, "w4_linear", lambda *args: wrong(right(*args)))
    assert "product of 5 rows: relative error" in disagreement(device, (5,))


def test_a_rounding_that_is_wrong_is_named(device, monkeypatch):
    from optimum_freeact.kernels import rounding_triton

    right = rounding_triton.round_rows
    monkeypatch.setattr(rounding_triton, "round_rows", lambda x, types, tables: right(x.roll(1, 1), types, tables))
    assert "rounding of 5 rows: relative error" in disagreement(device, (5,))


@pytest.mark.parametrize("answer", [None, "product of 1 rows: relative error 1, at most 0.01 was expected"])
def test_torch_takes_the_place_of_kernels_that_disagree(monkeypatch, answer):
    from optimum_freeact.kernels import dispatch

    monkeypatch.setenv("FREEACT_KERNELS", "auto")
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(self_check, "groups_obstacle", lambda index, special: answer)
    layer = {"weight_bits": 4, "activation_bits": 4, "transform": "hadamard", "width": 512}
    found = dispatch.plan("cuda:0", **layer, group_size=32, activation_group_size=16)
    assert found.name == ("triton" if answer is None else "torch")
    assert answer is None or found.reason.startswith(answer)
    assert dispatch.plan("cuda:0", **layer, group_size=None).name == "triton"  # one grid a row is not asked about


def test_whatever_a_compiler_raises_is_a_reason(monkeypatch):
    def broken(device, special):
        raise RuntimeError("ptxas\nmore")

    monkeypatch.setattr(self_check, "disagreement", broken)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    self_check.groups_obstacle.cache_clear()
    try:
        assert (
            self_check.groups_obstacle(7, lambda *args: None)
            == "the kernels for groups do not run on this GPU (RuntimeError: ptxas)"
        )
    finally:
        self_check.groups_obstacle.cache_clear()


@pytest.mark.parametrize(
    ("comparison", "asked"),
    [
        ("disagreement", lambda: self_check.groups_obstacle(7, lambda *args: None)),
        ("pass_disagreement", lambda: self_check.pass_obstacle(7, "rounding_pass_triton")),
        ("product_disagreement", lambda: self_check.stream_obstacle(7)),
    ],
    ids=["groups", "pass", "stream"],
)
def test_a_full_gpu_is_not_a_kernel_that_fails(monkeypatch, comparison, asked):
    def full(*args):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(self_check, comparison, full)
    with pytest.raises(torch.OutOfMemoryError, match="20.00 MiB"):
        asked()
    monkeypatch.setattr(self_check, comparison, lambda *args: None)
    try:
        assert asked() is None  # room was made, and nothing was remembered
    finally:
        for obstacle in (self_check.groups_obstacle, self_check.pass_obstacle, self_check.stream_obstacle):
            obstacle.cache_clear()


def test_the_kernel_of_this_gpu_alone_is_compared_too(device):
    import sys
    from types import SimpleNamespace

    asked = []

    def w4_linear(rows, types, weight, out_dtype):
        asked.append(len(rows.codes))
        return w4_groups_triton.w4_linear(rows, types, weight, out_dtype) * 2

    name = "optimum_freeact.kernels.of_this_gpu"
    sys.modules[name] = SimpleNamespace(w4_linear=w4_linear)
    try:
        said = self_check.disagreement(torch.device(device), lambda *args: "of_this_gpu", (5,))
    finally:
        del sys.modules[name]
    assert asked == [5]
    assert said.startswith("product of 5 rows")


def test_rounding_in_one_pass_is_compared(device, monkeypatch):
    from optimum_freeact.kernels import rounding_pass_triton

    assert self_check.pass_disagreement(torch.device(device), "rounding_pass_triton", (1, 5)) is None
    right = rounding_pass_triton.round_rows
    monkeypatch.setattr(
        rounding_pass_triton, "round_rows", lambda x, types, tables: right(x, types.roll(1), tables)
    )  # the next row's mean
    said = self_check.pass_disagreement(torch.device(device), "rounding_pass_triton", (5,))
    assert said.startswith("codes of 5 rows: error")


def test_the_product_of_few_rows_is_compared(device):
    from optimum_freeact.kernels import w4_triton

    made = []

    def right(*args):
        made.append(w4_triton.w4_linear(*args))
        return made[-1]

    assert self_check.product_disagreement(torch.device(device), right) is None
    assert len(made) == 4  # two numbers of rows, with a branch and without
    for wrong in (lambda y: y * 1.02, lambda y: y.roll(1, 1), lambda y: y * float("nan")):  # scale, order
        products = iter(map(wrong, made))
        found = self_check.product_disagreement(torch.device(device), lambda *args, products=products: next(products))
        assert found.startswith("product of 5 rows: relative error")


@pytest.mark.parametrize("answer", [None, "product of 5 rows: relative error 1, at most 0.01 was expected"])
def test_a_stream_that_disagrees_gives_way(monkeypatch, caplog, answer):
    from optimum_freeact.kernels import epilogue_triton, ops

    monkeypatch.setattr(ops, "_failed", {})
    monkeypatch.setattr(ops, "is_hopper", lambda index: True)
    monkeypatch.setattr(epilogue_triton, "counters", lambda device: None)
    monkeypatch.setattr(self_check, "stream_obstacle", lambda index: answer)
    for _ in range(2):
        ops.make_ready(torch.device("cuda", 0))
    assert ops.failures() == ({} if answer is None else {"w4_stream": answer})
    assert [r.levelname for r in caplog.records] == ([] if answer is None else ["WARNING"])
