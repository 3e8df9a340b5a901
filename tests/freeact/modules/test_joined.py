"""Linears that read one input as one product (in Triton's interpreter on a CPU)."""

import copy

import pytest
import torch
from torch import nn

from optimum_freeact.kernels import dispatch, ops, reference
from optimum_freeact.modules import activation, joined, linear
from optimum_freeact.modules.activation import FreeActInput
from optimum_freeact.modules.linear import FreeActLinear
from optimum_freeact.type_state import TypeState


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Layers on the CPU take what is planned for a GPU, whose product is the reference."""

    def plan(where, **layer):
        obstacle = dispatch.layer_obstacle(**layer)
        return dispatch.Plan("torch" if obstacle else "triton", "product", obstacle or "test")

    def round_rows(x, types, *tables):
        tensors = dict(zip(ops.TENSORS, tables[: len(ops.TENSORS)], strict=True))
        sizes = dict(zip(("a", "b", "bits", "symmetric", "group"), tables[len(ops.TENSORS) :], strict=True))
        made = ops.InputTables(**tensors, **sizes)
        asked = (made.clip, made.bits, made.symmetric, made.branch)
        rows = reference.round_rows(x, types, made.input_map(), *asked, group=made.group)
        rows = reference.marked(rows, types, made.rank, 2)
        return rows._replace(branch=x.new_zeros(len(x), 0) if rows.branch is None else rows.branch)

    calls = []

    def w4_linear(codes, stats, branch, types, *weight):
        calls.append(len(weight[0]))
        rows = reference.Rows(codes, stats, branch)  # marks and all
        return reference.w4_linear(rows, types, reference.Weight(*weight[:-1]), weight[-1])

    for module in (activation, linear):
        monkeypatch.setattr(module, "plan", plan)
    monkeypatch.setattr(ops, "round_rows", round_rows)
    monkeypatch.setattr(ops, "w4_linear", w4_linear)
    return calls


class Attention(nn.Module):
    """Three linears on one input, as in an attention of few key heads."""

    def __init__(self, sizes=(512, 256, 256), d=64, group=None, rank=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.source = FreeActInput(
            d, n_types=2, n_means=2, channel_scale=False, rank=rank, transform="hadamard", bits=4, symmetric=False,
            n_readers=len(sizes), state=TypeState(), group_size=16 if group else None,
        )  # fmt: skip
        self.source.state.types = torch.tensor([[0, 1, 0]])
        self.source.mean.normal_(generator=generator)
        if rank:
            self.source.basis.random_(-127, 128, generator=generator)
            self.source.basis_scale.fill_(1e-3)
        self.layers = nn.ModuleList()
        for m in sizes:
            made = FreeActLinear(d, m, self.source, bits=4, group_size=group or d, bias=False)
            made.weight.data.random_(0, 256, generator=generator)
            made.qscale.uniform_(0.01, 0.02, generator=generator)
            made.type_bias.normal_(generator=generator)
            made.type_shift.random_(-127, 128, generator=generator)
            made.type_shift_scale.fill_(0.01)
            if rank:
                made.low_rank.random_(-127, 128, generator=generator)
                made.low_rank_scale.uniform_(0.0, 0.01, generator=generator)
            if group:
                made.weight_group_scale.random_(-127, 128, generator=generator)
            self.layers.append(made)

    def prepare(self):
        for module in (*self.layers, self.source):
            module.prepare()
        return self

    def forward(self, x):
        return [layer(x) for layer in self.layers]


X = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"group": 32}, {"rank": 0}], ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_one_product_gives_what_several_do(as_on_a_gpu, options, order):
    model = Attention(**options).prepare()
    assert model.source._joined is not None
    as_on_a_gpu.clear()
    together = [layer(X) for layer in list(model.layers)[::order]][::order]
    assert as_on_a_gpu == [1024]
    model.source._joined = None
    alone = model(X)
    assert as_on_a_gpu == [1024, 512, 256, 256]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_weights_are_held_once_and_stay_those_of_the_layers(as_on_a_gpu):
    model = Attention()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.prepare()
    assert len({layer.weight.untyped_storage().data_ptr() for layer in model.layers}) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    y = model(X)
    model.layers[1].weight.data.zero_()  # through the view
    assert not torch.equal(model(X)[1], y[1])
    assert torch.equal(model(X)[0], y[0])


def test_what_is_written_later_counts(as_on_a_gpu):
    model = Attention().prepare()
    y = model(X)
    model.layers[2].set_bias_rows(torch.ones(2, 256))
    assert model.source._joined is None
    assert not torch.equal(model(X)[2], y[2])
    model.layers[2].prepare()
    assert model.source._joined is not None
    torch.testing.assert_close(model(X)[0], y[0])


def test_moved_loaded_and_copied(as_on_a_gpu):
    model = Attention().prepare()
    y = model(X)
    clone = copy.deepcopy(model)
    assert clone.source._joined is None
    clone.source.state.types = model.source.state.types  # of the forward, not copied
    for one, other in zip(clone(X), y, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    clone.prepare()
    assert clone.source._joined is not None
    model.to(torch.bfloat16)
    assert model.source._joined is not None
    other = Attention(sizes=(512, 256, 256))
    other.layers[0].weight.data.zero_()
    model.load_state_dict(other.state_dict())
    assert model.source._joined is not None
    torch.testing.assert_close(model(X)[0], other.prepare()(X)[0])


@pytest.mark.parametrize("sizes", [(512, 200, 256), (512,)], ids=str)
def test_sizes_that_do_not_fit(as_on_a_gpu, sizes):
    model = Attention(sizes=sizes).prepare()
    assert model.source._joined is None
    assert [y.shape[-1] for y in model(X)] == list(sizes)


def test_only_what_is_alike_is_joined(as_on_a_gpu):
    model = Attention().prepare()
    layer = model.layers[0]
    layer.type_bias = None
    assert joined.join(list(model.layers)) is None


@pytest.mark.usefixtures("fresh_compiler")
def test_traced_without_a_break(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(ops, "w4_linear", ops.w4_linear_op)
    monkeypatch.setattr(ops, "round_rows", ops.round_rows_op)
    monkeypatch.setattr(ops, "_attempt", lambda name, kernel, fallback: fallback())
    model = Attention().prepare()
    together = torch.compile(model, fullgraph=True, backend="eager")(X)
    for one, other in zip(together, model(X), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
