"""The donor as teacher through the plans: what it predicts, and what it represents, in the target's terms.

Weights of unrelated models transport poorly (docs/merge.md measures how poorly), but the plans also carry activations and
distributions. At every matched position both models have read the same text, so the donor's next-token distribution,
carried by the vocabulary plan, and its stream, carried by the stream map, are targets for the target's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_ot.anchors import MatchedText
from mergekit_ot.vocabulary import transport_distribution


@dataclass(frozen=True)
class Lesson:
    """What the donor says about one text, in the target's terms.

    Args:
        ids (`torch.Tensor` of shape `(length,)`): target token ids of the text.
        rows (`torch.Tensor` of shape `(n,)`): taught positions in it.
        tokens (`torch.Tensor` of shape `(n, k)`): target tokens the donor finds likeliest to come next.
        probabilities (`torch.Tensor` of shape `(n, k)`): their probabilities, rows summing to one.
        states (`torch.Tensor` of shape `(n, width_target)`, *optional*): normalised donor stream, transported.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor
    states: torch.Tensor | None = None


@torch.no_grad()
def prepare_lessons(
    donor: torch.nn.Module,
    texts: Sequence[MatchedText],
    plan: torch.Tensor,
    target_size: int,
    *,
    top: int = 64,
    stream_map: torch.Tensor | None = None,
    agreeing: bool = True,
) -> list[Lesson]:
    """Run the donor once over the adaptation texts and keep its likeliest continuations.

    Args:
        donor (`PreTrainedModel`): causal language model in eval mode.
        texts (`Sequence[MatchedText]`): texts in both tokenizations.
        plan (`torch.Tensor` of shape `(donor_size,)`): vocabulary plan.
        target_size (`int`): the target's vocabulary size.
        top (`int`, *optional*, defaults to 64): continuations kept per position.
        stream_map (`torch.Tensor` of shape `(width_target, width_donor)`, *optional*): also keep the last stream,
            transported.
        agreeing (`bool`, *optional*, defaults to `True`): leave out matched positions after which the tokenizations
            part, that is where the plan sends the donor's next token to another than the target's: there the donor
            was asked for a longer or a shorter piece of text, and its answer would argue against the right token.

    Returns:
        `list[Lesson]` on the CPU, one per text with taught rows.
    """
    device = next(donor.parameters()).device
    lessons = []
    for text in texts:
        pairs = [pair for pair in zip(text.target_rows, text.donor_rows) if not agreeing or _agree(text, *pair, plan)]
        if not pairs:
            continue
        ids = torch.tensor([text.donor_ids], device=device)
        target_rows, donor_rows = torch.tensor(pairs).T
        output = donor(input_ids=ids, use_cache=False, output_hidden_states=stream_map is not None)
        logits = output.logits[0, donor_rows.to(device)]
        likeliest = transport_distribution(logits, plan, target_size).topk(top, dim=-1)
        probabilities = likeliest.values / likeliest.values.sum(dim=-1, keepdim=True)
        states = None
        if stream_map is not None:
            rows = output.hidden_states[-2][0, donor_rows.to(device)].float()
            rows = rows / rows.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)
            states = (rows @ stream_map.to(rows).T).cpu()
        lessons.append(
            Lesson(
                torch.tensor(text.target_ids),
                target_rows.contiguous(),
                likeliest.indices.cpu(),
                probabilities.cpu(),
                states,
            )
        )
    return lessons


def _agree(text: MatchedText, target_row: int, donor_row: int, plan: torch.Tensor) -> bool:
    """Whether the tokens that follow a matched position correspond; never at the end of a side."""
    if target_row + 1 >= len(text.target_ids) or donor_row + 1 >= len(text.donor_ids):
        return False
    return int(plan[text.donor_ids[donor_row + 1]]) == text.target_ids[target_row + 1]


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
