"""Masks per token type: the paper's blocks, and when leaving coordinates out is exact."""

import pytest
import torch

from optimum_freeact.api import quantize
from optimum_freeact.calibration import closed_form
from optimum_freeact.calibration.exclusive_fit import choose_exclusive, exclusive_directions
from optimum_freeact.moments import Moments
from optimum_freeact.numerics.hadamard import random_orthogonal
from optimum_freeact.transforms.affine_map import InputMap
from optimum_freeact.transforms.exclusive import block_sizes, fixed_blocks, share_of
from tests.freeact.test_type_rules import IDS, masked_llama
from tests.helpers.quantized import logits, reload, settings


def test_two_types_have_a_block_each_and_share_the_rest():
    keep = fixed_blocks([1 / 8, 1 / 4], 16)
    assert keep[0].tolist() == [True] * 12 + [False] * 4
    assert keep[1].tolist() == [True] * 10 + [False] * 2 + [True] * 4


def test_a_type_without_a_share_keeps_everything_and_blocks_leave_half():
    keep = fixed_blocks([0.25, 0, 0.25], 16)
    assert keep[1].all()
    assert (~keep[[0, 2]]).sum(1).tolist() == [4, 4]
    assert sum(block_sizes([0.5, 0.5, 0.5], 30)) <= 15
    assert not (~fixed_blocks([0.5, 0.5, 0.5], 30)).all(0).any()


def test_shares_by_name_of_a_linear():
    assert share_of(0.25, ["self_attn.q_proj"]) == 0.25
    assert share_of({"q_proj": 0.25}, ["self_attn.q_proj", "self_attn.k_proj"]) == 0.25
    assert share_of({"q_proj": 0.25}, ["mlp.down_proj"]) == 0


def masked_output(x, kind, keep, transform, weight):
    found = InputMap(dense=transform, keep=keep.double())
    z, _ = found.apply(x, torch.full(x.shape[:-1], kind))
    return z @ found.transform_weight(weight)[0].mT


def test_it_is_exact_where_a_type_has_no_energy_in_the_others_blocks():
    """Proposition of the paper under its precondition: row space of X_k inside its shared and own columns."""
    generator = torch.Generator().manual_seed(0)
    transform = random_orthogonal(16, generator).double()
    keep, weight = fixed_blocks([1 / 8, 1 / 8], 16), torch.randn(10, 16, generator=generator).double()
    for kind in (0, 1):
        x = torch.randn(40, 16, generator=generator).double() * keep[kind] @ transform.mT
        torch.testing.assert_close(masked_output(x, kind, keep, transform, weight), x @ weight.mT)


def test_otherwise_the_error_is_the_dropped_coordinates_times_their_weights():
    generator = torch.Generator().manual_seed(1)
    transform = torch.randn(16, 16, generator=generator).double()  # any invertible one
    keep, weight = fixed_blocks([1 / 8, 1 / 4], 16), torch.randn(10, 16, generator=generator).double()
    x = torch.randn(40, 16, generator=generator).double()
    for kind in (0, 1):
        dropped = ~keep[kind]
        error = -(x @ transform[:, dropped]) @ (torch.linalg.inv(transform)[dropped] @ weight.mT)
        got = masked_output(x, kind, keep, transform, weight) - x @ weight.mT
        torch.testing.assert_close(got, error)
        assert error.norm() > 0.1 * (x @ weight.mT).norm()


def test_exact_masks_change_nothing_where_the_weight_has_full_column_rank():
    """With full column rank, any P with X P Pt W^T = X W^T gives the very activations of the ordinary inverse."""
    generator = torch.Generator().manual_seed(2)
    transform = random_orthogonal(16, generator).double()
    keep = fixed_blocks([1 / 8, 1 / 8], 16)
    x = torch.randn(40, 16, generator=generator).double() * keep[0] @ transform.mT
    found = InputMap(dense=transform, keep=keep.double())
    torch.testing.assert_close(found.apply(x, torch.zeros(40, dtype=torch.long))[0], x @ transform)


def test_a_quantized_model_uses_and_keeps_its_masks(tmp_path):
    model = quantize(
        masked_llama(), settings("freeact-paper", epochs=1, exclusive_share={"q_proj": 1 / 8, "down_proj": 1 / 12})
    )
    source = model.model.layers[0].self_attn.q_proj.source
    assert source.keep.shape == (2, 64)
    assert (~source.keep).sum(1).tolist() == [8, 8]
    assert model.model.layers[0].mlp.down_proj.source.keep.shape == (2, 96)
    assert model.model.layers[0].mlp.up_proj.source.keep is None
    z = source.input_map().apply(torch.randn(4, 64), torch.tensor([0, 1, 1, 0]))[0]
    assert torch.equal(z == 0, ~source.keep[[0, 1, 1, 0]])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), IDS), logits(model, IDS))
    bare = quantize(masked_llama(), settings("freeact-paper", epochs=1, exclusive="none"))
    assert bare.model.layers[0].self_attn.q_proj.source.keep is None


# --- ours: placed by a generalised eigenproblem, sized by measured error ---------------------------------------------


def two_types(n=3000, width=32, own=4, seed=0):
    """Rows of two types; type 1 alone has energy in the last `own` directions, type 0 alone in the `own` before."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.arange(n) % 2
    x = torch.randn(n, width, generator=generator)
    x[types == 0, width - own :] *= 1e-3
    x[types == 1, width - 2 * own : width - own] *= 1e-3
    turn = random_orthogonal(width, generator).float()
    return x @ turn, types, turn


def test_directions_are_those_that_only_the_others_use():
    x, types, turn = two_types()
    c = [(x[types == k].double().mT @ x[types == k].double()) / 1500 for k in (0, 1)]
    found = exclusive_directions(c[0], c[1], 4)
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=torch.float64))
    wanted = turn[-4:].double()  # rows that type 1 alone uses
    assert (wanted @ found).square().sum() > 3.99
    assert float((x[types == 0].double() @ found).square().mean()) < 1e-5


def test_moments_that_are_a_little_less_than_positive_are_damped_further():
    x, types, _ = two_types()
    c = [(x[types == k].double().mT @ x[types == k].double()) / 1500 for k in (0, 1)]
    values, vectors = torch.linalg.eigh(c[0])
    values[0] = -0.01 * values.mean()
    found = exclusive_directions(vectors @ torch.diag(values) @ vectors.mT, c[1], 4)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.mT @ found, torch.eye(4, dtype=torch.float64))


class Asked:
    token_types = ("text", "mask")
    activation_bits, activation_symmetric = 4, False


@pytest.mark.parametrize("energy", [0.0, -1e-10])
def test_a_type_whose_tokens_are_all_alike_leaves_out_what_the_others_use(energy):
    """Masks before the first block: no energy about their mean, or a little less than none."""
    others = torch.diag(torch.tensor([1.0, 9.0, 4.0, 0.0], dtype=torch.float64))
    found = exclusive_directions(energy * torch.eye(4, dtype=torch.float64), others, 2)
    assert torch.allclose(found.abs(), torch.eye(4, dtype=torch.float64)[:, [1, 2]], atol=1e-6)


def test_sizes_stay_within_the_budget_and_never_raise_the_measured_error():
    x, types, _ = two_types()
    moments = Moments(32, 2, torch.device("cpu"), n_rows=1024)
    for part, kinds in zip(x.split(300), types.split(300), strict=True):
        moments.update(part, kinds)
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).double()
    found = InputMap(dense=random_orthogonal(32, torch.Generator().manual_seed(2)).double())
    directions, sizes = choose_exclusive(moments, found, weight, Asked)
    assert len(sizes) == 2
    assert (directions is None) == (sizes == [0, 0])
    assert max(sizes) <= 32 // 16
    assert choose_exclusive(moments, found, weight, type("Exact", (Asked,), {"activation_bits": 16}))[0] is None


@pytest.mark.parametrize("planted", [False, True])
def test_left_out_directions_are_saved_and_used(planted, tmp_path, monkeypatch):
    """With directions planted (measured error seldom chooses any), types leave out their own and nothing else."""
    if planted:
        monkeypatch.setattr(
            closed_form, "choose_exclusive", lambda m, *_: (torch.eye(m.shift.shape[1])[:, :3].double(), [0, 0, 3])
        )
    model = quantize(masked_llama(), settings(exclusive="closed_form"))
    config, source = model.hf_quantizer.quantization_config, model.model.layers[0].self_attn.q_proj.source
    if planted:
        assert config.exclusive_sizes["0.self_attn.q_proj"] == 3
        assert source.leaves_out.tolist() == [[False] * 3, [False] * 3, [True] * 3]
        u = torch.randn(3, 64)
        found, types = source.input_map(), torch.tensor([0, 1, 2])
        z, _ = found.apply(u + source.mean.float(), types)
        kept = u.clone()
        kept[2, :3] = 0
        torch.testing.assert_close(z, found.apply_centred(kept)[0], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), IDS), logits(model, IDS))
