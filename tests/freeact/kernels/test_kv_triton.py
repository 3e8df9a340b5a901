"""The kernels of the 4-bit KV cache against their specification."""

import pytest
import torch

from optimum_freeact.kernels import kv_reference
from optimum_freeact.kernels.kv_reference import CacheRows
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.vector_codec import encode, grid_dtype, row_bytes


def turns(tokens, n):
    angles = torch.arange(tokens).double()[:, None] * 10000.0 ** -(torch.arange(n).double() / max(n, 1))
    return angles.cos().float(), angles.sin().float()


def a_rotation(size, device):
    return flat_rotation(size, torch.Generator().manual_seed(0)).float().to(device)


def stored(
    batch, heads, tokens, size, dtype, *, mean=True, n=None, sink=1, seed=0, room=0, rotate=False, device="cpu"
) -> tuple[CacheRows, torch.Tensor]:
    """Rows of random states with loud means, in a buffer that may have room for more; and what was not stored."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, heads, tokens, size, generator=generator) * (
        0.2 + torch.rand(size, generator=generator)
    )
    buffer = torch.zeros(batch, heads, tokens + room, row_bytes(size, 4), dtype=torch.uint8)
    buffer[:, :, :tokens] = encode(values, 4, grid_dtype(dtype))
    rows = CacheRows(buffer.to(device)[:, :, :tokens], grid_dtype(dtype))
    if mean:
        rows.mean = (torch.randn(heads, size, generator=generator) * 3).to(device)
        if n:
            rows.cos, rows.sin = (table.to(device) for table in turns(2 * tokens, n))
    if rotate:
        rows.rotation = a_rotation(size, device)
    if sink:
        rows.exact = torch.randn(batch, heads, sink, size, generator=generator).to(dtype).to(device)
    return rows, values


def both(batch, heads, tokens, size, dtype, device, n=None, mean=True, sink=1, room=0, rotate=False):
    options = {"sink": sink, "mean": mean, "rotate": rotate, "device": device}
    keys, _ = stored(batch, heads, tokens, size, dtype, n=n, seed=0, room=room, **options)
    values, _ = stored(batch, heads, tokens, size, dtype, seed=1, **options)
    return keys, values


CASES = [
    # batch, heads, queries, tokens, size, settings
    (1, 2, 3, 150, 64, {"n": 32}),
    (2, 1, 8, 65, 128, {"n": 64, "room": 30}),
    (2, 2, 1, 7, 32, {"n": 8}),
    (1, 1, 2, 64, 80, {"mean": False}),
    (1, 1, 4, 130, 64, {"sink": 0, "n": 32}),
    (2, 1, 2, 90, 64, {"sink": 3, "n": 32}),
    (1, 1, 2, 20, 64, {}),
    (2, 2, 3, 150, 64, {"n": 32, "rotate": True}),
    (2, 1, 4, 70, 128, {"n": 64, "sink": 3, "room": 9, "rotate": True}),
    (1, 1, 2, 40, 80, {"n": 20, "sink": 0, "rotate": True}),
    (1, 2, 1, 30, 48, {"mean": False, "rotate": True}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_as_near_as_torchs_own(case, dtype, device):
    """At most twice the error that torch makes when it decodes to `dtype` and attends in it."""
    from optimum_freeact.kernels import kv_attend_triton

    if dtype == torch.float32 and device == "cuda":
        pytest.skip("float32 is read unpacked")
    batch, heads, queries, tokens, size, settings = case
    keys, values = both(batch, heads, tokens, size, dtype, device, **settings)
    query = torch.randn(batch, heads, queries, size, generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    start = (torch.arange(batch, dtype=torch.int32) * 5).to(device)
    mask = torch.arange(tokens, device=device)[None] >= start[:, None] if batch > 1 else None
    scale = size**-0.5
    arguments = (keys, values, start, scale, mask)
    want = kv_reference.attend(query.double(), *arguments, dtype=torch.float64)
    got = kv_attend_triton.attend(query, *arguments)
    k, v = (kv_reference.states(rows, start, size, torch.float32).to(dtype) for rows in (keys, values))
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, k, v, attn_mask=None if mask is None else mask[:, None, None], scale=scale
    )
    assert got.dtype == dtype
    own = float((plain.double() - want).norm() / want.norm())
    ours = float((got.double() - want).norm() / want.norm())
    # float32, which only the interpreter is asked for, shows that nothing else is wrong
    assert ours <= (2 * own if dtype != torch.float32 else 5e-6), (ours, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n", "size", "rotate"),
    [(None, 64, False), (16, 64, False), (32, 64, False), (32, 64, True), (None, 48, True), (20, 80, True)],
)
def test_rows_are_written_as_specified(n, size, rotate, dtype, device):
    from optimum_freeact.kernels import kv_write_triton

    batch, heads, tokens, position = 2, 3, 5, 11
    states = torch.randn(batch, heads, tokens, size, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    rows = CacheRows(torch.empty(0), grid_dtype(dtype))
    start = torch.tensor([0, 13], dtype=torch.int32, device=device)
    rows.mean = torch.randn(heads, size, generator=torch.Generator().manual_seed(1)).to(device)
    if n:
        rows.cos, rows.sin = (table.to(device) for table in turns(64, n))
    if rotate:
        rows.rotation = a_rotation(size, device)
    out = torch.zeros(batch, heads, 9, row_bytes(size, 4), dtype=torch.uint8, device=device)
    kv_write_triton.write_rows(states, rows, start, position, out[:, :, 2:7])
    shifted = CacheRows(encode(torch.zeros(batch, heads, position + tokens, size), 4, torch.bfloat16).to(device), torch.bfloat16,
                        rows.mean, rows.cos, rows.sin)  # fmt: skip
    means = kv_reference.states(shifted, start, size, torch.float32)[:, :, position:]
    centred = states.float() - means
    want = encode(centred @ rows.rotation if rotate else centred, 4, grid_dtype(dtype))
    got = out[:, :, 2:7]
    assert (out[:, :, :2] == 0).all()
    assert (out[:, :, 7:] == 0).all()
    same = (got == want).float().mean()
    assert same > 0.995, same  # a value on the edge between two codes may fall to the other side
    back, meant = (
        kv_reference.states(CacheRows(data.contiguous(), grid_dtype(dtype)), start, size, torch.float64)
        for data in (got, want)
    )
    reach = (states.float() - means).amax() - (states.float() - means).amin()
    assert (back - meant).abs().max() < reach / 15 * 1.1
    assert float((back - meant).norm() / meant.norm()) < 0.01


@pytest.mark.parametrize("rotate", [False, True])
def test_what_is_not_finite_stays_so(rotate, device):
    from optimum_freeact.kernels import kv_write_triton

    states = torch.randn(1, 1, 3, 64)
    states[0, 0, 1, 5], states[0, 0, 2, 6] = float("nan"), float("inf")
    states = states.to(device)
    rows = CacheRows(torch.empty(0), torch.float16, rotation=a_rotation(64, device) if rotate else None)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    rows.data = torch.zeros(1, 1, 3, 36, dtype=torch.uint8, device=device)
    kv_write_triton.write_rows(states, rows, start, 0, rows.data)
    back = kv_reference.states(rows, start, 64, torch.float32)
    assert back.isnan().all(-1).flatten().tolist() == [False, True, True]
    assert back.isnan().any(-1).flatten().tolist() == [False, True, True]
