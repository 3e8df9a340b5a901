"""Pooling must not care where the padding is."""

import torch

from trl_mlc.pooling import last_token_pool, mean_pool


def padded(side):
    states = [torch.randn(n, 5) for n in (4, 2, 1)]
    torch.manual_seed(1)
    batch, mask = torch.randn(3, 4, 5), torch.zeros(3, 4, dtype=torch.long)
    for i, state in enumerate(states):
        where = slice(0, len(state)) if side == "right" else slice(4 - len(state), 4)
        batch[i, where], mask[i, where] = state, 1
    return states, batch, mask


def test_last_token_with_padding_on_either_side():
    for side in ("left", "right"):
        states, batch, mask = padded(side)
        assert torch.equal(last_token_pool(batch, mask), torch.stack([s[-1] for s in states]))


def test_mean_ignores_padding_and_keeps_the_dtype():
    for side in ("left", "right"):
        states, batch, mask = padded(side)
        assert torch.allclose(mean_pool(batch, mask), torch.stack([s.mean(0) for s in states]))
    assert mean_pool(batch.bfloat16(), mask).dtype == torch.bfloat16
