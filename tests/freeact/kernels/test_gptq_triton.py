"""The column loops of GPTQ in Triton against those in torch: the same codes but where a last bit decides."""

import pytest
import torch

from optimum_freeact.rounding import gptq as plain


def case(width, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    moments = x.mT @ x / len(x)
    weight = torch.randn(outputs, width, generator=generator) / width**0.5
    return weight, moments


def loss(codes, weight, steps, moments):
    gap = (codes * steps - weight.mT).double()
    return float((gap * (moments @ gap)).sum())


@pytest.mark.parametrize(("width", "outputs"), [(64, 16), (96, 5), (136, 17)])
@pytest.mark.parametrize("bits", [4, 8])
def test_same_codes_as_torch(device, width, outputs, bits):
    from optimum_freeact.kernels import gptq_triton

    weight, moments = case(width, outputs)
    factor, added = plain.inverse_factor(moments, 0.01)
    steps = (weight.abs().amax(1) / (2 ** (bits - 1) - 0.5)).expand(width, outputs).contiguous()
    steps = steps * (1 + torch.arange(width)[:, None] // 32)  # groups
    limits = plain.code_range(bits)
    expected = plain._round_columns(weight.mT.contiguous(), steps, factor.float(), limits)
    on = [t.to(device) for t in (weight.mT.contiguous(), steps, factor.float())]
    got = gptq_triton.round_columns(*on, limits).cpu()
    assert torch.equal(got, got.round())
    assert (got.min(), got.max()) >= limits[:1]
    assert got.max() <= limits[1]
    # an edge that falls the other way changes what follows it in that row; the loss is the same
    assert (got != expected).float().mean() < 0.05
    assert loss(got, weight, steps, moments) == pytest.approx(loss(expected, weight, steps, moments), rel=0.03)
    damped = (moments + added * torch.eye(width)).float()
    before = loss(expected, weight, steps, damped.double())
    mine = expected.clone().to(device)
    plain._descend(expected, weight.mT.contiguous(), steps, damped, limits)
    gptq_triton.descend(mine, *[t.to(device) for t in (weight.mT.contiguous(), steps, damped)], limits)
    after = loss(mine.cpu(), weight, steps, damped.double())
    assert after < before
    assert after == pytest.approx(loss(expected, weight, steps, damped.double()), rel=0.01)
    assert (mine.cpu() != expected).float().mean() < 0.02


def test_it_stands_in_where_tensors_are_on_a_gpu_and_torch_where_it_fails(monkeypatch):
    """What decides: the device; a kernel that fails is replaced for good, with the same result."""
    assert plain.column_loops(torch.device("cpu")) == (plain._round_columns, plain._descend)

    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(plain, "_failed", [])
    monkeypatch.setattr(plain, "column_loops", lambda device: (broken, broken))  # noqa: ARG005
    weight, moments = case(96, 5)
    got = plain.gptq(weight, moments, 4, 32, passes=1)
    assert plain._failed
    monkeypatch.undo()
    expected = plain.gptq(weight, moments, 4, 32, passes=1)
    assert torch.equal(got.codes, expected.codes)


def test_a_kernel_that_cannot_be_imported_is_replaced_too(monkeypatch):
    def missing(device):  # noqa: ARG001
        raise ImportError("cannot import name")

    monkeypatch.setattr(plain, "_failed", [])
    weight, moments = case(96, 5)
    expected = plain.gptq(weight, moments, 4, 32, passes=1)
    with monkeypatch.context() as changed:
        calls = []

        def first_missing(device):
            calls.append(device)
            return missing(device) if len(calls) == 1 else (None, None)

        changed.setattr(plain, "column_loops", first_missing)
        got = plain.gptq(weight, moments, 4, 32, passes=1)
    assert "ImportError" in plain._failed[0]
    assert torch.equal(got.codes, expected.codes)
