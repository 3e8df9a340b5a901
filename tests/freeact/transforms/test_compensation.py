"""The map that gives a quantized attention's output its full-precision moments: closed form, folded into the weight."""

import pytest
import torch

from optimum_freeact.api import quantize
from optimum_freeact.moments import Moments
from optimum_freeact.transforms.compensation import block_covariances, block_size, fit_compensation
from tests.freeact.test_type_rules import masked_llama
from tests.helpers.quantized import distance, logits, reload, settings
from tests.helpers.tiny_models import sample_ids


def rows(n, seed, width=32):
    """Correlated rows of two types with means of their own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    types = torch.arange(n) % 2
    return torch.randn(n, width, generator=generator) @ mix + 3 * types[:, None], types


def moments_of(x, types):
    found = Moments(x.shape[1], 2, torch.device("cpu"))
    found.update(x, types)
    return found


def test_mapped_rows_have_the_wanted_moments():
    (x, types), (y, _) = rows(4000, 0), rows(4000, 1)
    map_ = fit_compensation(moments_of(x, types), moments_of(y, types), shrinkage=0.0)
    means = torch.stack([x[types == k].double().mean(0) for k in (0, 1)])
    centred = (x.double() - means[types]).unflatten(-1, (-1, 16))
    mapped = torch.einsum("nbi,bij->nbj", centred, map_.blocks).flatten(1) + map_.means[types]
    got, wanted = moments_of(mapped, types), moments_of(y, types)
    for kind in (0, 1):
        torch.testing.assert_close(got.mean(kind), wanted.mean(kind), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block_covariances(got, 16), block_covariances(wanted, 16), rtol=1e-2, atol=1e-3)


def test_equal_moments_need_no_map():
    x, types = rows(500, 0)
    map_ = fit_compensation(moments_of(x, types), moments_of(x, types))
    eye = torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
    torch.testing.assert_close(map_.blocks, eye, rtol=1e-6, atol=1e-6)


def test_folding_into_the_weight_is_exact():
    (x, types), (y, _) = rows(500, 0), rows(500, 1)
    map_ = fit_compensation(moments_of(x, types), moments_of(y, types))
    weight = torch.randn(7, 32, dtype=torch.float64)
    mapped = torch.einsum("nbi,bij->nbj", x.double().unflatten(-1, (-1, 16)), map_.blocks).flatten(1)
    torch.testing.assert_close(mapped @ weight.mT, x.double() @ map_.of_weight(weight).mT)


def test_blocks_divide_any_width():
    assert [block_size(width) for width in (576, 24, 7, 34)] == [16, 12, 7, 2]


@pytest.mark.parametrize("changes", [{}, {"centring": "none", "low_rank": 0}, {"centring": "shared"}])
def test_it_is_off_by_default_saved_and_changes_the_readers_of_attention_only(changes, tmp_path):
    ids = sample_ids(2, 12, seed=5)
    expected = logits(masked_llama(), ids)
    plain = quantize(masked_llama(), settings(**changes))
    model = quantize(masked_llama(), settings(attention_compensation=True, **changes))
    first, other = model.model.layers[0], plain.model.layers[0]
    assert torch.equal(first.self_attn.q_proj.weight, other.self_attn.q_proj.weight)
    assert not torch.equal(first.self_attn.o_proj.weight, other.self_attn.o_proj.weight)
    assert distance(logits(model, ids), expected) < 1.5 * distance(logits(plain, ids), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), ids), logits(model, ids))


def test_without_rounding_it_changes_nothing():
    """Full-precision queries, keys and values have full-precision moments."""
    ids = sample_ids(2, 12, seed=5)
    exact = {"weight_bits": 16, "activation_bits": 16}
    for centring in ("none", "per_type"):
        model = quantize(masked_llama(), settings(attention_compensation=True, centring=centring, **exact))
        torch.testing.assert_close(logits(model, ids), logits(masked_llama(), ids), rtol=5e-3, atol=5e-3)


def test_it_refuses_what_does_not_go_with_it():
    for changes in ({"calibration": "learned"}, {"error_correction": True}):
        with pytest.raises(ValueError, match="attention_compensation"):
            settings(attention_compensation=True, **changes)
