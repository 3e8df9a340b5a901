"""Lay prompts end to end in a few long rows, so that hardly a token of a forward is padding.

Prompts of ten languages differ several times in length: padded to the longest, a third of a forward is padding, and divided
by length it is several forwards. Positions that start again at zero are how transformers marks a new sequence in a row; its
masks for eager and SDPA attention then keep sequences apart. Whether a model does so is tried ([`keeps_apart`]).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from trl_mlc.devices import sent
from trl_mlc.early_exit import hidden_state_at
from trl_mlc.pooling import POOLINGS


SHORTEST_ROW = 128  # in tokens: shorter rows leave ends, much longer ones pay for attention that is masked
MOST_TOKENS = 16384  # in one forward: enough to keep a GPU busy, and what a layer recomputes stays small
GPU_ROW = 512  # there a shape that was never seen costs as much as the forward (plans and kernels are made for it)
KEPT_APART = ("sdpa", "eager")  # attention that is masked by positions in every row of a batch
TOLERANCES = {torch.float64: 1e-3, torch.float32: 5e-3}  # relative, TF32 included; in lower precision a tenth


class Layout(NamedTuple):
    """Where prompts lie: `rows[r]` are the prompts of row r in order, each row `width` tokens long."""

    rows: list[list[int]]
    width: int


def lay_out(lengths: Sequence[int], shortest: int = SHORTEST_ROW) -> Layout:
    """First fit, the longest prompt first.

    Args:
        lengths (`Sequence[int]`): tokens of each prompt.
        shortest (`int`, *optional*): width of a row, unless a prompt is longer or all together are shorter.
    """
    width = max(max(lengths), min(shortest, sum(lengths)))
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r, room in enumerate(left) if room >= lengths[i]), len(rows))
        if r == len(rows):
            rows.append([])
            left.append(width)
        rows[r].append(i)
        left[r] -= lengths[i]
    return Layout(rows, width - min(left))


def rows_at_once(width: int) -> int:
    """How many rows of a width run in one forward."""
    return max(1, MOST_TOKENS // width)


def in_few_shapes(lengths: Sequence[int]) -> Layout:
    """As [`lay_out`], with a width that hardly ever differs and, above sixteen, an even number of rows in a forward.

    So there are two dozen shapes in all, each of which is soon no longer new, and hardly an empty row.
    """
    longest, total = max(lengths), sum(lengths)
    step = GPU_ROW if total > GPU_ROW else 64
    width = -(-max(longest, min(total, GPU_ROW)) // step) * step
    rows = lay_out(lengths, width).rows
    last = len(rows) % rows_at_once(width)  # rows of the last forward; the others are full
    return Layout(rows + [[] for _ in range(last % 2 if last > 16 else 0)], width)


def encode_packed(
    decoder: nn.Module, input_ids: torch.Tensor, lengths: Sequence[int], layer: int, pooling: str = "last"
) -> torch.Tensor:
    """One vector per prompt, as [`~trl_mlc.early_exit.encode_prompts`] gives them, without padding.

    Args:
        decoder (`nn.Module`): from [`~trl_mlc.early_exit.decoder_of`], one that [`keeps_apart`].
        input_ids (`torch.LongTensor` of shape `(P, T)`): right-padded prompts.
        lengths (`Sequence[int]`): their tokens.
        layer (`int`): in `[0, L]`.
        pooling (`str`, *optional*, defaults to `"last"`): `"last"` or `"mean"`.

    Returns:
        `torch.Tensor` of shape `(P, d)`.
    """
    device = input_ids.device
    rows, width = lay_out(lengths, SHORTEST_ROW) if device.type != "cuda" else in_few_shapes(lengths)
    taken = torch.zeros(len(rows), width, dtype=torch.int64)  # which entry of input_ids is where
    positions = torch.zeros(len(rows), width, dtype=torch.int64)  # what is left over: each token a sequence of its own
    starts = [0] * len(lengths)
    for r, prompts in enumerate(rows):
        at = r * width
        for i in prompts:
            starts[i] = at
            at += lengths[i]
    counts = torch.tensor(lengths)
    step = torch.arange(sum(lengths)) - (counts.cumsum(0) - counts).repeat_interleave(
        counts
    )  # of a token in its prompt
    place = step + torch.tensor(starts).repeat_interleave(counts)
    positions.view(-1)[place] = step
    taken.view(-1)[place] = step + (torch.arange(len(lengths)) * input_ids.shape[1]).repeat_interleave(counts)
    ids, positions = input_ids.flatten()[sent(taken, device)], sent(positions, device)
    parts = zip(ids.split(rows_at_once(width)), positions.split(rows_at_once(width)), strict=True)
    states = torch.cat([hidden_state_at(decoder, a, None, layer, b) for a, b in parts])
    states = states.flatten(0, 1)  # (rows * width, d)
    first, count = (sent(torch.tensor(numbers), device).unsqueeze(1) for numbers in (starts, lengths))
    if pooling == "last":
        return states[(first + count - 1).squeeze(1)]
    steps = torch.arange(max(lengths), device=device).unsqueeze(0)
    inside = steps < count  # (P, T)
    return POOLINGS[pooling](states[torch.where(inside, first + steps, first)], inside)


@torch.no_grad()
def keeps_apart(decoder: nn.Module, layer: int) -> bool:
    """Whether the state of a prompt is the same behind another one as alone. Tried, in evaluation mode, on two rows."""
    if getattr(decoder.config, "_attn_implementation", None) not in KEPT_APART:
        return False
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return False
    weight = next(decoder.parameters())
    lengths = [9, 2, 7, 3]  # rows of 9 + 2 and 7 + 3 tokens
    ids = torch.arange(36, device=weight.device).view(4, 9) % min(29, decoder.config.vocab_size)
    was_training = decoder.training
    decoder.eval()
    try:
        alone = [hidden_state_at(decoder, ids[i : i + 1, :n], None, layer)[0, -1] for i, n in enumerate(lengths)]
        expected = torch.stack(alone).double()
        found = _in_two_rows(decoder, ids, lengths, layer).double()
    except (TypeError, ValueError, RuntimeError, IndexError):  # a decoder with rules of its own for positions or masks
        return False
    finally:
        decoder.train(was_training)
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)
    return bool(error.max() <= TOLERANCES.get(weight.dtype, 0.1))


def _in_two_rows(decoder: nn.Module, ids: torch.Tensor, lengths: list[int], layer: int) -> torch.Tensor:
    """Last states of four prompts in two rows, the shorter one behind."""
    width = lengths[0] + lengths[1]
    rows, positions = ids.new_zeros(2, width), ids.new_zeros(2, width)
    ends = []
    for r, (a, b) in enumerate(((0, 1), (2, 3))):
        at = 0
        for i in (a, b):
            n = lengths[i]
            rows[r, at : at + n], positions[r, at : at + n] = ids[i, :n], torch.arange(n, device=ids.device)
            at += n
            ends.append(r * width + at - 1)
    return hidden_state_at(decoder, rows, None, layer, positions).flatten(0, 1)[ends]
