"""Directions of a type's own: columns that the weight has once more, exact for every type, used by one."""

import pytest
import torch

from optimum_freeact import FreeActConfig
from optimum_freeact.api import quantize
from optimum_freeact.calibration import closed_form
from optimum_freeact.calibration.closed_form import GroupFit
from optimum_freeact.modules.surgery import replace_group
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.hadamard import random_orthogonal
from optimum_freeact.transforms.affine_map import InputMap, pick
from optimum_freeact.type_state import TypeState
from tests.freeact.test_type_rules import IDS, masked_llama
from tests.helpers.quantized import logits, reload, settings


D, SHARED, OWN, KINDS = 24, 2, 3, 3


def expanded(seed=0, orthonormal=True):
    """A map whose types share two columns and have three each of their own."""
    generator = torch.Generator().manual_seed(seed)
    width = SHARED + KINDS * OWN
    basis = torch.randn(D, width, generator=generator, dtype=torch.float64)
    uses = torch.zeros(KINDS, width, dtype=torch.float64)
    uses[:, :SHARED] = 1
    for kind in range(KINDS):
        uses[kind, SHARED + kind * OWN : SHARED + (kind + 1) * OWN] = 1
    if orthonormal:
        basis = torch.linalg.qr(basis)[0]
    return InputMap(
        mean=torch.randn(KINDS, D, generator=generator, dtype=torch.float64),
        basis=basis,
        uses=uses,
        dense=torch.randn(D, D, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("orthonormal", [True, False], ids=["orthonormal", "as stored"])
def test_one_weight_side_is_exact_for_every_type_of_full_rank(orthonormal):
    found, generator = expanded(orthonormal=orthonormal), torch.Generator().manual_seed(1)
    x = torch.randn(90, D, generator=generator, dtype=torch.float64)
    weight, types = torch.randn(10, D, generator=generator, dtype=torch.float64), torch.arange(90) % KINDS
    assert torch.linalg.matrix_rank(x) == D
    z, p = found.apply(x, types)
    v, low_rank = found.transform_weight(weight)
    y = z @ v.mT + p @ low_rank.mT + pick(found.mean @ weight.mT, types)
    torch.testing.assert_close(y, x @ weight.mT, rtol=1e-10, atol=1e-10)


def test_types_map_the_same_row_differently_and_leave_the_others_columns_out():
    found, x = expanded(), torch.randn(5, D, dtype=torch.float64)
    z, p = zip(*(found.apply_centred(x, torch.full((5,), kind)) for kind in range(KINDS)))
    for kind in range(KINDS):
        assert torch.equal(p[kind] == 0, (found.uses[kind] == 0).expand(5, -1))
        assert not torch.allclose(z[kind], z[kind - 1])


def test_moments_are_those_of_a_types_own_rows():
    found, x = expanded(), torch.randn(200, D, dtype=torch.float64)
    for kind in range(KINDS):
        z, _ = found.apply_centred(x, torch.full((200,), kind))
        torch.testing.assert_close(found.transform_moments(x.mT @ x, kind), z.mT @ z)


def fitted(type_rank, seed=0):
    """Relative output error at 4 bits of a linear whose two types have strong directions that differ."""
    generator = torch.Generator().manual_seed(seed)
    types, turn = torch.arange(4000) % 2, random_orthogonal(64, generator).float()
    strong = torch.ones(2, 64)
    strong[0, :2], strong[1, 2:4] = 12.0, 12.0
    x = (torch.randn(4000, 64, generator=generator) * strong[types]) @ turn
    block = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    original = block[0].weight.detach().clone()
    moments = Moments(64, 2, torch.device("cpu"))
    for rows, kinds in zip(x.split(500), types.split(500), strict=True):
        moments.update(rows, kinds)
    config = FreeActConfig(
        preset="freeact-fast", low_rank=2, type_rank=type_rank, token_types=["text", "mask"], type_rules={"mask": [0]}
    )
    linears, state = [block[0]], TypeState()
    source, targets = replace_group(block, ["0"], config, state, "cpu")
    GroupFit(["0"], linears, source, targets, moments, config).closed_form(torch.Generator().manual_seed(0))
    state.types = types
    y = targets[0](x)
    wanted = x @ original.mT
    return float((y - wanted).square().sum() / wanted.square().sum()), targets[0], x, types, state


def test_it_carries_what_a_shared_branch_of_that_rank_cannot():
    assert fitted(2)[0] < 0.7 * fitted(0)[0]


def test_a_mixed_batch_gives_each_token_what_a_batch_of_its_type_does():
    _, linear, x, types, state = fitted(2)
    mixed = linear(x)
    for kind in (0, 1):
        rows = types == kind
        state.types = types[rows]
        assert torch.equal(linear(x[rows].clone()), mixed[rows])


def test_a_quantized_model_keeps_and_uses_them(tmp_path):
    model = quantize(masked_llama(), settings("freeact-fast", low_rank=2, type_rank=2))
    source = model.model.layers[0].self_attn.q_proj.source
    assert source.basis.shape == (64, 2 + 3 * 2)
    assert source.uses[2].tolist() == [True] * 2 + [False] * 4 + [True] * 2
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), IDS), logits(model, IDS))
    plain = quantize(masked_llama(), settings("freeact-fast", low_rank=2))
    assert not torch.equal(logits(plain, IDS), logits(model, IDS))


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(ValueError, match="type_rank > 0"):
        FreeActConfig(type_rank=2, exclusive="closed_form")
    with pytest.raises(ValueError, match="type_rank must be an integer"):
        FreeActConfig(type_rank=-1)


def test_dequantizing_takes_the_columns_of_text_alone():
    """Weights of 8 bits: what is left is their rounding and the branch's, nothing of other types' columns."""
    model = quantize(
        masked_llama(), settings("freeact-fast", weight_bits=8, activation_bits=8, low_rank=2, type_rank=2)
    )
    quantized, plain = model.model.layers[0].self_attn.q_proj, masked_llama().model.layers[0].self_attn.q_proj
    weight, _ = quantized.dequantized()
    error = (weight - plain.weight).square().sum() / plain.weight.square().sum()
    assert error < 1e-3


@pytest.mark.parametrize("part", ["maps", "outputs"])
@pytest.mark.parametrize("changes", [{"type_rank": 2}, {"exclusive": "closed_form"}], ids=["own columns", "subspaces"])
def test_what_is_learned_goes_on_from_a_types_own_parts(part, changes, monkeypatch, tmp_path):
    """Learned calibration keeps them, is taken only if it is better, and what is saved is what was learned."""
    if "exclusive" in changes:
        monkeypatch.setattr(
            closed_form, "choose_exclusive", lambda m, *_: (torch.eye(m.shift.shape[1])[:, :3].double(), [0, 0, 3])
        )
    model = quantize(
        masked_llama(), settings(calibration="learned", learned_part=part, epochs=2, batch_size=2, **changes)
    )
    source = model.model.layers[0].self_attn.q_proj.source
    assert source.mean.shape[0] == 3
    assert (source.uses if "type_rank" in changes else source.leaves_out) is not None
    for record in model._freeact_records:
        assert record.learned["accepted"] == (record.learned["held_out_after"] < record.learned["held_out_before"])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), IDS), logits(model, IDS))
