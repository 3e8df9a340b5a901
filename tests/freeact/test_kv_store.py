"""Rounding, rotation and means of cached states: bounds of the error, and exactness without rounding."""

import pytest
import torch

from optimum_freeact.kernels import kv_reference
from optimum_freeact.modules.kv_layer import FreeActCacheLayer
from optimum_freeact.modules.kv_store import CacheSpec, StateStore
from optimum_freeact.numerics.vector_codec import decode, outward_grid
from tests.helpers.cache_states import HEADS, SIZE, quantized, states


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_step(bits):
    keys, values = states()
    returned = quantized(CacheSpec(bits, sink_tokens=0), keys, values)
    for got, exact in zip(returned, (keys, values)):
        scale = outward_grid(exact, bits, torch.float16)[0].double()
        assert ((got - exact).abs() <= scale / 2 * (1 + 1e-9)).all()
        assert not torch.equal(got, exact)


@pytest.mark.parametrize("bits", [4, 8])
def test_rotation_is_undone(bits):
    """A rotated error keeps its norm, so it stays below the bound of the grid of the rotated vector."""
    keys, values = states()
    spec = CacheSpec(bits, rotate=True, sink_tokens=0)
    layer = FreeActCacheLayer(spec)
    returned = layer.update(keys, values)
    rotation = layer.stores[0]._rotation(keys.device)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(SIZE).double(), rtol=0, atol=1e-12)
    for got, exact in zip(returned, (keys, values)):
        scale = outward_grid(exact @ rotation, bits, torch.float16)[0].double()
        assert ((got - exact).norm(dim=-1) <= scale[..., 0] / 2 * SIZE**0.5 * (1 + 1e-9)).all()


def test_rotation_spreads_an_outlier():
    keys, values = states()
    keys[..., 3] *= 40
    plain = quantized(CacheSpec(4), keys, values)[0]
    rotated = quantized(CacheSpec(4, rotate=True), keys, values)[0]
    others = [channel for channel in range(SIZE) if channel != 3]
    energy = keys[..., others].square().sum()
    assert (rotated - keys)[..., others].square().sum() < 0.7 * (plain - keys)[..., others].square().sum()
    assert (plain - keys)[..., others].square().sum() > 0.3 * energy  # the case is not trivial


@pytest.mark.parametrize("rotate", [False, True])
def test_states_equal_to_their_mean_are_exact(rotate):
    means = torch.randn(2, HEADS, SIZE, dtype=torch.float64) * 10
    spec = CacheSpec(4, rotate=rotate, sink_tokens=0, key_mean=[None, means[0]], value_mean=[None, means[1]])
    shape = (3, HEADS, 5, SIZE)
    keys, values = means[0][None, :, None].expand(shape), means[1][None, :, None].expand(shape)
    got_keys, got_values = FreeActCacheLayer(spec, 1).update(keys, values)
    torch.testing.assert_close(got_keys, keys, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_values, values, rtol=0, atol=1e-12)


def turned(mean, frequencies, positions):
    """`mean` (heads, head_dim) at each position, by complex numbers: (..., heads, tokens, head_dim)."""
    n = frequencies.numel()
    phase = torch.exp(1j * positions.double()[..., None, :, None] * frequencies)
    pairs = torch.complex(mean[:, :n], mean[:, n : 2 * n])[:, None] * phase
    rest = mean[:, None, 2 * n :].expand(*pairs.shape[:-1], -1)
    return torch.cat((pairs.real, pairs.imag, rest), -1)


@pytest.mark.parametrize("rotary", [3, 8])  # part of the channels, and all
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 5)])
@pytest.mark.parametrize("start", [[0, 0, 0], [0, 4, 2]])
def test_a_mean_before_the_rotary_embedding_turns_with_the_position(rotary, pieces, start):
    mean = torch.randn(HEADS, SIZE, dtype=torch.float64) * 10
    frequencies = 10000 ** -torch.linspace(0, 1, rotary, dtype=torch.float64)
    positions = torch.arange(9) - torch.tensor(start)[:, None]
    keys, values = turned(mean, frequencies, positions), torch.randn(3, HEADS, 9, SIZE, dtype=torch.float64)
    spec = CacheSpec(4, rotate=True, sink_tokens=0, key_mean=[mean], key_frequencies=[frequencies])
    layer = FreeActCacheLayer(spec)
    layer.set_start(torch.tensor(start))
    for piece in zip(keys.split(pieces, 2), values.split(pieces, 2)):
        got = layer.update(*piece)[0]
    for row, first in enumerate(start):  # nothing is left to round; padding may round as it likes
        torch.testing.assert_close(got[row, :, first:], keys[row, :, first:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [[0, 0, 0], [0, 4, 2]])
def test_scores_are_those_of_rotated_rows_and_of_the_turned_mean(start):
    """q k = (q R) ((k - m) R) + q m, m turned by the position: what a kernel adds up, exact without rounding."""
    keys, query = states()[0], torch.randn(3, HEADS, 4, SIZE, dtype=torch.float64)
    mean = torch.randn(HEADS, SIZE, dtype=torch.float64) * 10
    frequencies = 10000 ** -torch.linspace(0, 1, 5, dtype=torch.float64)
    first = torch.tensor(start)
    store = StateStore(CacheSpec(4, rotate=True), keys, mean, frequencies)
    rotation = store.rotation(keys.device)
    offset = store._offset(store.mean, keys.shape[2], first, 0)
    rows = (keys - offset) @ rotation
    scores = (query @ rotation) @ rows.mT + query @ offset.mT
    torch.testing.assert_close(scores, query @ keys.mT, rtol=0, atol=1e-11)
    positions = (torch.arange(keys.shape[2]) - first[:, None]).clamp_min(0)
    expected = torch.stack([turned(mean, frequencies, row) for row in positions])
    torch.testing.assert_close(offset.expand_as(expected), expected, rtol=0, atol=1e-12)
    # and the specification of the kernels holds to it with rows as they are stored
    packed = store.packed(store.encode(keys, first, 0), keys.shape[2])
    packed.exact = None
    stored = decode(packed.data, 4, SIZE, packed.storage, torch.float64)
    wanted = (query @ rotation) @ stored.mT + query @ offset.mT
    got = query @ kv_reference.states(packed, first, SIZE, torch.float64).mT
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_wrong_frequencies_cost_only_precision():
    keys, values = states()
    mean = torch.randn(HEADS, SIZE, dtype=torch.float64)
    spec = CacheSpec(8, key_mean=[mean], key_frequencies=[torch.tensor([3.0, 0.01, 100.0])])
    got = quantized(spec, keys, values)[0]
    scale = (keys.abs().max() + 1.5 * mean.abs().max()) * 2 / 255
    assert 0 < (got - keys).abs().max() < scale


def test_mean_narrows_the_grid():
    keys, values = states()
    mean = torch.randn(HEADS, SIZE, dtype=torch.float64) * 20
    shifted = keys + mean[:, None]
    centred = quantized(CacheSpec(4, key_mean=[mean]), shifted, values)[0]
    torch.testing.assert_close(centred, quantized(CacheSpec(4), keys, values)[0] + mean[:, None], rtol=0, atol=1e-10)
    plain = quantized(CacheSpec(4), shifted, values)[0]
    assert (centred - shifted).square().mean() < 0.1 * (plain - shifted).square().mean()
