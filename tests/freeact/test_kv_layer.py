"""The cache layers on their own: what they store, and every operation against a plain layer of dequantized states."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from optimum_freeact.modules.kv_layer import FreeActCacheLayer, FreeActSlidingWindowLayer
from optimum_freeact.modules.kv_store import CacheSpec
from tests.helpers.cache_states import HEADS, SIZE, quantized, states


def assert_same(layer, plain):
    """Equal but for the order of float64 sums in the rotation."""
    for got, expected in zip(layer.states(), (plain.keys, plain.values)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert layer.get_seq_length() == plain.get_seq_length()
    assert layer.get_mask_sizes(2) == plain.get_mask_sizes(2)


@pytest.mark.parametrize("sink_tokens", [0, 1, 3])
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (2, 1, 6), (5, 4)])
def test_the_cut_into_calls_does_not_matter(sink_tokens, pieces):
    keys, values = states()
    start = [0, 4, 2]
    spec = CacheSpec(4, sink_tokens=sink_tokens)
    whole = quantized(spec, keys, values, start)
    layer = FreeActCacheLayer(spec)
    layer.set_start(torch.tensor(start))
    for piece in zip(keys.split(pieces, 2), values.split(pieces, 2)):
        returned = layer.update(*piece)
    assert torch.equal(returned[0], whole[0])
    assert torch.equal(returned[1], whole[1])
    exact = (whole[0] == keys).all(-1).all(1)  # (batch, tokens)
    expected = torch.zeros_like(exact)
    for row, first in enumerate(start):
        expected[row, first : first + sink_tokens] = True
    assert torch.equal(exact, expected)


def test_start_is_settled_by_the_first_real_token():
    keys, values = states(batch=2, tokens=6)
    layer = FreeActCacheLayer(CacheSpec(4))
    layer.set_start(torch.tensor([0, 3]))  # row 1: only padding so far
    layer.update(keys[:, :, :3], values[:, :, :3])
    assert layer.awaits_start
    layer.set_start(torch.tensor([2, 4]))  # row 0 has started and keeps its sink; row 1 learns more
    got = layer.update(keys[:, :, 3:], values[:, :, 3:])[0]
    assert not layer.awaits_start
    assert layer.start.tolist() == [0, 4]
    exact = (got == keys).all(-1).all(1)
    assert exact.nonzero().tolist() == [[0, 0], [1, 4]]


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize(
    "operation",
    [
        lambda layer: layer.crop(-4),
        lambda layer: layer.crop(-8),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([False, True, True])),
        lambda layer: (layer.offload(), layer.prefetch()),
    ],
    ids=["crop4", "crop8", "crop0", "reorder", "repeat", "select", "mask", "offload"],
)
def test_operations_equal_those_of_a_plain_layer(operation, sink_tokens, rotate):
    spec = CacheSpec(4, rotate=rotate, sink_tokens=sink_tokens)
    keys, values = states()
    start = torch.tensor([0, 3, 1])
    layer, plain = FreeActCacheLayer(spec), DynamicLayer()
    layer.set_start(start)
    plain.update(*layer.update(keys, values))
    operation(layer)
    operation(plain)
    assert_same(layer, plain)
    more = states(batch=plain.keys.shape[0], tokens=2)
    follower = FreeActCacheLayer(spec)  # what the new tokens look like: past the sink, except after a deep crop
    follower.set_start(layer.start - layer.get_seq_length())
    expected = plain.update(*follower.update(*more))
    for got, want in zip(layer.update(*more), expected):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_reset_forgets():
    layer = FreeActCacheLayer(CacheSpec(4))
    layer.set_start(torch.tensor([2, 0, 0]))
    layer.update(*states())
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.nbytes() == 0
    with pytest.raises(ValueError, match="holds no states yet"):
        layer.states()
    keys, values = states(batch=1, tokens=4)
    assert torch.equal(layer.update(keys, values)[0], quantized(CacheSpec(4), keys, values)[0])


@pytest.mark.parametrize("record_past", [False, True])
@pytest.mark.parametrize("pieces", [(14,), (1,) * 14, (3, 8, 1, 2), (5, 5, 4)])
def test_sliding_window_equals_a_plain_one(pieces, record_past):
    spec, start = CacheSpec(4, rotate=True, sink_tokens=2), [0, 3, 9]
    keys, values = states(tokens=14)
    exact_once = quantized(spec, keys, values, start)
    layer, plain = FreeActSlidingWindowLayer(spec, sliding_window=6), DynamicSlidingWindowLayer(sliding_window=6)
    layer.set_start(torch.tensor(start))
    for item in (layer, plain):
        if record_past:
            item.activate_past_recording()
    position = 0
    for piece in pieces:
        assert layer.get_mask_sizes(piece) == plain.get_mask_sizes(piece)
        span = slice(position, position + piece)
        expected = plain.update(exact_once[0][:, :, span], exact_once[1][:, :, span])
        for got, want in zip(layer.update(keys[:, :, span], values[:, :, span]), expected):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        position += piece
    assert_same(layer, plain)
    if record_past:
        layer.crop(-2)
        plain.crop(-2)
        assert_same(layer, plain)
        assert layer.keys.shape[-2] == 5


@pytest.mark.parametrize(("bits", "ratio"), [(4, 36 / 128), (8, 68 / 128)])
def test_memory_next_to_bfloat16(bits, ratio):
    """Heads of 64: 0.28 of bfloat16 with 4 bits, 0.53 with 8; the one exact token adds 1/2000 here."""
    keys, values = states(batch=1, tokens=2000, size=64, dtype=torch.bfloat16)
    layer, plain = FreeActCacheLayer(CacheSpec(bits)), DynamicLayer()
    layer.update(keys, values)
    plain.update(keys, values)
    assert layer.nbytes() / (plain.keys.nbytes + plain.values.nbytes) == pytest.approx(ratio + 1 / 2000, abs=1e-9)
    without_sink = FreeActCacheLayer(CacheSpec(bits, sink_tokens=0))
    without_sink.update(keys, values)
    assert without_sink.nbytes() == without_sink.keys.nbytes + without_sink.values.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_in_the_models_type(dtype):
    keys, values = states(dtype=dtype)
    got = quantized(CacheSpec(8, rotate=True), keys, values)
    assert got[0].dtype == got[1].dtype == dtype
    assert (got[0].double() - keys.double()).abs().max() < 0.05


def test_keys_and_values_may_differ_in_size():
    """As in multi-head latent attention."""
    keys, values = torch.randn(2, HEADS, 5, 24), torch.randn(2, HEADS, 5, 7)
    layer = FreeActCacheLayer(CacheSpec(4, rotate=True))
    got = layer.update(keys, values)
    assert got[0].shape == keys.shape
    assert got[1].shape == values.shape


def test_gradients_pass_to_the_states_of_this_call():
    layer = FreeActCacheLayer(CacheSpec(4))
    layer.update(*states(tokens=4))
    keys, values = (tensor.requires_grad_() for tensor in states(tokens=3))
    got = layer.update(keys, values)
    weight = torch.randn_like(got[0])
    (got[0] * weight).sum().backward()
    assert torch.equal(keys.grad, weight[:, :, 4:])
    assert values.grad is None
    torch.testing.assert_close(got[0].detach(), layer.states()[0], rtol=0, atol=1e-15)


def test_nan_reaches_attention():
    keys, values = states()
    keys[1, 0, 4, 2] = float("nan")
    got = quantized(CacheSpec(4), keys, values)[0]
    assert got[1, 0, 4].isnan().all()
    assert got.isnan().sum() == SIZE


@pytest.mark.parametrize("bits", [0, 2, 5, 32, "4", None])
def test_bits_outside_the_list(bits):
    with pytest.raises(ValueError, match=rf"must be 4, 8 or 16, got {bits!r}"):
        CacheSpec(bits)


@pytest.mark.parametrize("sink_tokens", [-1, 1.5, None])
def test_sink_tokens_outside_the_range(sink_tokens):
    with pytest.raises(ValueError, match=f"sink_tokens .* got {sink_tokens}"):
        CacheSpec(sink_tokens=sink_tokens)


def test_layer_errors():
    with pytest.raises(ValueError, match="got 16; use DynamicLayer"):
        FreeActCacheLayer(CacheSpec(16))
    with pytest.raises(ValueError, match="key_mean of the CacheSpec has 1 entries, there is none for layer 1"):
        FreeActCacheLayer(CacheSpec(key_mean=[None]), 1)
    with pytest.raises(ValueError, match="key_mean is None; pass both or neither"):
        CacheSpec(key_frequencies=[torch.ones(2)])
    with pytest.raises(ValueError, match="9 rotary frequencies do not fit a head_dim of 16"):
        FreeActCacheLayer(CacheSpec(key_mean=[torch.zeros(2, 16)], key_frequencies=[torch.ones(9)])).update(*states())
    with pytest.raises(ValueError, match=r"mean .* shape \(3, 16\), the states have 2 heads of 16"):
        FreeActCacheLayer(CacheSpec(value_mean=[torch.zeros(3, 16)])).update(*states())
