"""The extractor's start, and the language means."""

import pytest
import torch

from trl_mlc.extractor import Extractor, LanguageMeans


def test_start_is_seeded_in_torchs_range_and_touches_no_global_stream():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = Extractor(400, 64, seed=1), Extractor(400, 64, seed=1), Extractor(400, 64, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.proj.weight, second.proj.weight)
    assert not torch.equal(first.proj.weight, other.proj.weight)
    assert 0.99 * 400**-0.5 < first.proj.weight.abs().max() <= 400**-0.5
    assert first.proj.weight.std().item() == pytest.approx((400 * 3) ** -0.5, rel=0.02)


def test_identity_frozen_and_dtype():
    states = torch.randn(3, 8, dtype=torch.bfloat16)
    identity = Extractor(8, 0)
    assert torch.equal(identity(states), states.float())
    assert list(identity.parameters()) == []
    frozen = Extractor(8, 4, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(states).dtype == torch.float32


def test_means_follow_each_language_by_itself():
    means = LanguageMeans(3, 2, momentum=0.75)
    states = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 8.0]])
    languages = torch.tensor([0, 0, 2])
    assert means.of(languages).abs().max() == 0
    means.update_(*means.sums(states, languages))
    assert means.of(torch.tensor([0, 1, 2])).tolist() == [[3.0, 0.0], [0.0, 0.0], [0.0, 8.0]]
    means.update_(*means.sums(torch.tensor([[7.0, 4.0]]), torch.tensor([0])))
    assert means.of(torch.tensor([0, 2])).tolist() == [[4.0, 1.0], [0.0, 8.0]]
    means.grow_(5)
    assert means.of(torch.tensor([4, 0])).tolist() == [[0.0, 0.0], [4.0, 1.0]]


def test_the_common_mean_weighs_languages_alike_and_leaves_their_distance():
    means = LanguageMeans(3, 2, common=True)
    states = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 8.0]])
    languages = torch.tensor([0, 0, 2])
    means.update_(*means.sums(states, languages))
    assert means.of(torch.tensor([2, 0, 1])).tolist() == [[1.5, 4.0]] * 3
    means.grow_(5)
    assert means.of(torch.tensor([0])).tolist() == [[1.5, 4.0]]


def test_means_of_two_processes_add_up():
    states, languages = torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 1])
    one, two = LanguageMeans(2, 4), LanguageMeans(2, 4)
    one.update_(*one.sums(states, languages))
    parts = [two.sums(states[part], languages[part]) for part in (slice(0, 2), slice(2, 6))]
    two.update_(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])
    assert torch.allclose(one.means, two.means)
