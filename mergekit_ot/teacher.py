"""The donor as teacher through the plans: what it predicts, and what it represents, in the target's terms.

Weights of unrelated models transport poorly (docs/merge.md measures how poorly), but the plans also carry activations and
distributions. At every matched position both models have read the same text, so the donor's next-token distribution,
carried by the vocabulary plan, and its stream, carried by the stream map, are targets for the target's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from mergekit_ot.anchors import MatchedText
from mergekit_ot.spelling import Spelling


@dataclass(frozen=True)
class Lesson:
    """What the donor says about one text, in the target's terms.

    Args:
        ids (`torch.Tensor` of shape `(length,)`): target token ids of the text.
        rows (`torch.Tensor` of shape `(n,)`): taught positions in it.
        tokens (`torch.Tensor` of shape `(n, k)`): target tokens the donor finds likeliest to come next.
        probabilities (`torch.Tensor` of shape `(n, k)`): their probabilities, rows summing to one.
        state_rows (`torch.Tensor` of shape `(m,)`, *optional*): positions at which both models have read the same text.
        states (`torch.Tensor` of shape `(m, width_target)`, *optional*): normalised donor stream there, transported.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor
    state_rows: torch.Tensor | None = None
    states: torch.Tensor | None = None


@torch.no_grad()
def prepare_lessons(
    donor: torch.nn.Module,
    texts: Sequence[MatchedText],
    spelling: Spelling,
    target_size: int,
    *,
    top: int = 64,
    stream_map: torch.Tensor | None = None,
    inside: bool = True,
    batch: int = 1,
) -> list[Lesson]:
    """Run the donor once over the adaptation texts and keep its likeliest continuations.

    Args:
        donor (`PreTrainedModel`): causal language model in eval mode.
        texts (`Sequence[MatchedText]`): texts in both tokenizations.
        spelling ([`Spelling`]): vocabulary plan.
        target_size (`int`): the target's vocabulary size.
        top (`int`, *optional*, defaults to 64): continuations kept per position.
        stream_map (`torch.Tensor` of shape `(width_target, width_donor)`, *optional*): also keep the last stream,
            transported, at the positions that both tokenizations share.
        inside (`bool`, *optional*, defaults to `True`): also teach inside donor tokens, see `Spelling.taught_rows`.
        batch (`int`, *optional*, defaults to 1): texts read together.

    Returns:
        `list[Lesson]` on the CPU, one per text with taught rows, in order.
    """
    device = next(donor.parameters()).device
    chosen = [(text, rows) for text in texts if (rows := spelling.taught_rows(text, inside))]
    unspoken = (spelling.first < 0).to(device)
    lessons = []
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        ids = pad_sequence([torch.tensor(text.donor_ids) for text, _ in part], batch_first=True)
        # padded on the right: a causal model's states before the padding are as without it
        output = donor(input_ids=ids.to(device), use_cache=False, output_hidden_states=stream_map is not None)
        for i, (text, rows) in enumerate(part):
            logits = output.logits[i, : len(text.donor_ids)].float().masked_fill(unspoken, float("-inf"))
            moved = spelling.distributions(torch.log_softmax(logits, dim=-1), text, rows, target_size)
            likeliest = moved.topk(min(top, target_size), dim=-1)
            probabilities = likeliest.values / likeliest.values.sum(dim=-1, keepdim=True)
            state_rows = states = None
            if stream_map is not None:
                pairs = [(row.target_row, row.donor_row) for row in rows if not row.read]
                state_rows, donor_rows = torch.tensor(pairs).T
                stream = output.hidden_states[-2][i, donor_rows.to(device)].float()
                stream = stream / stream.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
                states = (stream @ stream_map.to(stream).T).cpu()
            where = torch.tensor([row.target_row for row in rows])
            answers = likeliest.indices.cpu(), probabilities.cpu()
            lessons.append(Lesson(torch.tensor(text.target_ids), where, *answers, state_rows, states))
    return lessons


def distribution_loss(logits: torch.Tensor, tokens: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    r"""Cross entropy \\( -\sum_k q_k \log p_k \\) of the target's prediction against the donor's transported one.

    Args:
        logits (`torch.Tensor` of shape `(n, target_size)`): target logits at matched positions.
        tokens, probabilities (`torch.Tensor` of shape `(n, k)`): a lesson's.

    Returns:
        Scalar tensor: mean over positions. Its minimum over logits is the entropy of `probabilities`.
    """
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens)
    return -(probabilities * chosen).sum(dim=-1).mean()


def stream_loss(stream: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Mean squared distance between the target's normalised stream and the donor's transported one.

    Args:
        stream (`torch.Tensor` of shape `(n, width_target)`): target stream at matched positions.
        states (`torch.Tensor` of shape `(n, width_target)`): a lesson's.

    Returns:
        Scalar tensor: mean over positions and channels.
    """
    stream = stream.float()
    normed = stream / stream.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
    return (normed - states.to(normed)).square().mean()
