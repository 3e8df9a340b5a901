"""The kernels of the KV cache against their specification, once on each GPU before a cache uses them, as `self_check` does for the
others. Where they disagree with torch, or do not run, torch writes and reads the cache.
"""

from __future__ import annotations

import torch

from optimum_freeact.kernels import kv_reference
from optimum_freeact.kernels.asked_once import asked_once
from optimum_freeact.kernels.kv_reference import CacheRows
from optimum_freeact.kernels.self_check import ROUNDING_ERROR, obstacle_of, relative
from optimum_freeact.numerics.hadamard import flat_rotation
from optimum_freeact.numerics.vector_codec import encode, grid_dtype, row_bytes


HEADS, SIZE, QUERIES, SINK = 2, 64, 3, 1  # head_dim 64: half of it turns with the position
STARTS = (0, 5)  # one row whole, one padded on the left
TOKENS = 130  # more than one block of a program that reads, and not a multiple of it
WRITTEN = (1, 70)  # a step, and a prompt: few rows and many (`kv_write_triton.FEW`) have launches of their own
DTYPE = torch.bfloat16
# Attention's weights are bfloat16 on tensor cores, as its outputs are; torch's own is 0.002 off, what is wrong of the order of one
ATTENTION_ERROR = 0.03


@asked_once
def cache_obstacle(index: int | None, rotated: bool) -> str | None:
    """Why the kernels of the KV cache are not to be used on a CUDA device, or `None`; `rotated` states have kernels of their own."""
    return obstacle_of("the kernels of the KV cache", index, lambda device: cache_disagreement(device, rotated))


def cache_disagreement(device: torch.device, rotated: bool, written: tuple[int, ...] = WRITTEN) -> str | None:
    """What differs by more than rounding does, or `None`; `written` are numbers of tokens written at once."""
    kind = "rotated states" if rotated else "states"
    for tokens in written:
        error = _writing_error(device, rotated, tokens)
        if not error <= ROUNDING_ERROR:  # nan too
            return f"{tokens} {kind} written: relative error {error:.2g}, at most {ROUNDING_ERROR:g} was expected"
    error = _reading_error(device, rotated)
    if not error <= ATTENTION_ERROR:
        return f"attention to {kind}: relative error {error:.2g}, at most {ATTENTION_ERROR:g} was expected"
    return None


def _writing_error(device: torch.device, rotated: bool, tokens: int) -> float:
    from optimum_freeact.kernels.kv_write_triton import write_rows

    states = _random(len(STARTS), HEADS, tokens, SIZE, seed=0).to(device, DTYPE)
    rows, start, position = _kept(device, rotated, seed=1), _starts(device), 3
    written = torch.zeros(*states.shape[:3], row_bytes(SIZE, 4), dtype=torch.uint8, device=device)
    write_rows(states, rows, start, position, written)
    nothing = torch.zeros(len(STARTS), HEADS, position + tokens, SIZE, device=device)
    rows.data = encode(nothing, 4, rows.storage)
    means = kv_reference.states(rows, start, SIZE, torch.float64)[:, :, position:]
    centred = states.double() - means
    if rows.rotation is not None:
        centred = centred @ rows.rotation.double()
    got, want = (CacheRows(data, rows.storage) for data in (written, encode(centred, 4, rows.storage)))
    return relative(*(kv_reference.states(found, start, SIZE, torch.float64) for found in (got, want)))


def _reading_error(device: torch.device, rotated: bool) -> float:
    from optimum_freeact.kernels.kv_attend_triton import attend

    keys, values = (_kept(device, rotated, seed) for seed in (1, 2))
    values.cos = values.sin = None  # means of values do not turn
    for seed, rows in ((3, keys), (4, values)):
        rows.data = encode(_random(len(STARTS), HEADS, TOKENS, SIZE, seed=seed).to(device), 4, rows.storage)
        rows.exact = _random(len(STARTS), HEADS, SINK, SIZE, seed=seed + 2).to(device, DTYPE)
    query = _random(len(STARTS), HEADS, QUERIES, SIZE, seed=7).to(device, DTYPE)
    start = _starts(device)
    mask = torch.arange(TOKENS, device=device) >= start[:, None]
    arguments = (keys, values, start, SIZE**-0.5, mask)
    return relative(attend(query, *arguments), kv_reference.attend(query.double(), *arguments, dtype=torch.float64))


def _kept(device: torch.device, rotated: bool, seed: int) -> CacheRows:
    """How one kind of states is stored, with all parts; no rows yet."""
    angles = torch.arange(256).double()[:, None] * 1000.0 ** -(torch.arange(SIZE // 4).double() / (SIZE // 4))
    rotation = flat_rotation(SIZE, torch.Generator().manual_seed(0)).float().to(device) if rotated else None
    return CacheRows(
        torch.empty(0),
        grid_dtype(DTYPE),
        mean=_random(HEADS, SIZE, seed=seed).to(device),
        cos=angles.cos().float().to(device),
        sin=angles.sin().float().to(device),
        rotation=rotation,
    )


def _starts(device: torch.device) -> torch.Tensor:
    return torch.tensor(STARTS, dtype=torch.int32, device=device)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
