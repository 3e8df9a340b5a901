import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_freeact.numerics.packing import bytes_per_group, pack, unpack


def round_trip(codes, bits):
    return unpack(pack(codes, bits), bits, codes.shape[-1], torch.float32)


def test_all_nibble_pairs():
    low, high = torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij")
    codes = torch.stack((low, high), -1).reshape(256, 1, 2).to(torch.int8)
    packed = pack(codes, 4)
    assert sorted(packed.flatten().tolist()) == list(range(256))  # each byte once
    assert torch.equal(round_trip(codes, 4), codes)


def test_the_picture_in_the_docstring():
    packed = pack(torch.tensor([[[-8, 7, 0, -1]]]), 4)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[[0xF0, 0x78]]]
    assert pack(torch.tensor([[[-128, 127, 0]]]), 8).tolist() == [[[0, 255, 128]]]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 17)),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.int8, torch.int64, torch.float16, torch.float32]),
    seed=st.integers(0, 2**20),
)
def test_round_trip_of_any_shape_and_type(shape, bits, dtype, seed):
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:2], bytes_per_group(shape[2], bits, torch.float32))
    restored = unpack(packed, bits, shape[2], torch.float32)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, codes.to(torch.int8))


@pytest.mark.parametrize("bits", [4, 8])
def test_non_contiguous_input(bits):
    codes = torch.randint(-8, 8, (6, 3, 10), dtype=torch.int8)
    for view in (codes.permute(1, 0, 2), codes.permute(2, 1, 0), codes[::2, :, 1::2]):
        assert torch.equal(pack(view, bits), pack(view.contiguous(), bits))
        assert torch.equal(round_trip(view, bits), view)
    packed = pack(codes, bits).permute(1, 0, 2)
    assert torch.equal(unpack(packed, bits, 10, torch.float32), codes.permute(1, 0, 2))


def test_an_odd_group_is_padded_by_a_zero_code():
    packed = pack(torch.tensor([[[1, 2, 3]]]), 4)
    assert packed.tolist() == [[[0xA9, 0x8B]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sixteen_bits_are_the_raw_weights(dtype):
    weights = torch.randn(4, 2, 6).to(dtype)
    weights[0, 0, 0] = float("nan")
    packed = pack(weights, 16)
    assert packed.shape == (4, 2, bytes_per_group(6, 16, dtype))
    restored = unpack(packed, 16, 6, dtype)
    assert restored.dtype == dtype
    assert torch.equal(restored.view(torch.uint8), weights.view(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_codes_that_are_not_finite_are_refused(bits, bad):
    codes = torch.zeros(2, 3, 4)
    codes[1, 2, :2] = bad
    with pytest.raises(ValueError, match=rf"2 of 24 codes are NaN or infinite and have no {bits}-bit form"):
        pack(codes, bits)


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 32])
def test_bits_that_have_no_format(bits):
    match = f"4, 8 or 16 bits, got {bits}"
    with pytest.raises(ValueError, match=match):
        pack(torch.zeros(1, 1, 2), bits)
    with pytest.raises(ValueError, match=match):
        unpack(torch.zeros(1, 1, 2, dtype=torch.uint8), bits, 2, torch.float32)
    with pytest.raises(ValueError, match=match):
        bytes_per_group(2, bits, torch.float32)
