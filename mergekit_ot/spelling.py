"""The plan between two vocabularies: how the target spells every donor token.

Where a donor token spells the same text as a target token they correspond; any other is cut into pieces. Its probability speaks for the first piece where both models stand
at the same character, for the second once the target has read the first, and so on: the donor's distribution, kept to the
tokens that begin with what the target has read since, is one over the next piece. Where it is the target that has the
longer token, the donor reaches it in several steps, and the probability of the whole is the product along them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mergekit_ot.anchors import MatchedText
from mergekit_ot.vocabulary import spoken_tokens


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaughtRow:
    """One position of the target at which the donor says what comes next.

    Args:
        target_row, donor_row (`int`): where the target stands, and the last position that both share.
        read (`tuple[int, ...]`): target tokens read since that shared position.
        steps (`tuple[int, ...]`): where the target's next token is several donor tokens long: those tokens.
    """

    target_row: int
    donor_row: int
    read: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Spelling:
    """The target tokens of every donor token.

    Args:
        pieces (`tuple[tuple[int, ...], ...]`): one entry per row of the donor's head; empty for special tokens, unused
            rows and fragments of characters.
    """

    pieces: tuple[tuple[int, ...], ...]

    @cached_property
    def first(self) -> torch.Tensor:
        """The first piece of every donor token, -1 where there is none."""
        return torch.tensor([pieces[0] if pieces else -1 for pieces in self.pieces], dtype=torch.long)

    @cached_property
    def _after(self) -> dict[tuple[int, ...], tuple[list[int], list[int]]]:
        after: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
        for i, pieces in enumerate(self.pieces):
            for k in range(1, len(pieces)):
                tokens, following = after.setdefault(pieces[:k], ([], []))
                tokens.append(i)
                following.append(pieces[k])
        return after

    def after(self, read: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Donor tokens that begin with these target tokens and go on, `(n,)`, and what each goes on with, `(n,)`."""
        tokens, following = self._after.get(read, ([], []))
        return torch.tensor(tokens, dtype=torch.long), torch.tensor(following, dtype=torch.long)

    def taught_rows(self, text: MatchedText, inside: bool = True) -> list[TaughtRow]:
        """Positions of a text at which this plan can say what the donor expects, in order.

        A position is taken when the donor's own next tokens spell the target's: elsewhere it was asked for another
        piece of text, and its answer would argue against the right token.

        Args:
            text ([`MatchedText`]): a text in both tokenizations.
            inside (`bool`, *optional*, defaults to `True`): also positions inside a donor token, and target tokens that
                span several donor tokens; `False` keeps to those after which both go on with the same token.
        """
        rows = []
        pairs = list(zip(text.target_rows, text.donor_rows))
        following = dict(zip(pairs, pairs[1:]))
        for row, donor_row in pairs:
            if row + 1 >= len(text.target_ids) or donor_row + 1 >= len(text.donor_ids):
                continue
            pieces, coming = self.pieces[text.donor_ids[donor_row + 1]], text.target_ids[row + 1 :]
            agreeing = 0
            while agreeing < min(len(pieces), len(coming)) and pieces[agreeing] == coming[agreeing]:
                agreeing += 1
            if agreeing:
                rows += [TaughtRow(row + k, donor_row, pieces[:k]) for k in range(agreeing if inside else 1)]
            elif inside:
                next_row, next_donor = following.get((row, donor_row), (-1, -1))
                if next_row == row + 1 and next_donor > donor_row + 1:
                    rows.append(TaughtRow(row, donor_row, steps=tuple(text.donor_ids[donor_row + 1 : next_donor + 1])))
        return rows

    def distributions(
        self, log_probabilities: torch.Tensor, text: MatchedText, rows: Sequence[TaughtRow], target_size: int
    ) -> torch.Tensor:
        """The donor's next-token distributions over the target's vocabulary.

        Args:
            log_probabilities (`torch.Tensor` of shape `(donor_length, donor_size)`): the donor's, of all its positions,
                zero mass on tokens without pieces.
            text ([`MatchedText`]): the text.
            rows (`Sequence[TaughtRow]`): of `taught_rows`.
            target_size (`int`): the target's vocabulary size.

        Returns:
            `torch.Tensor` of shape `(len(rows), target_size)` in float32, rows summing to one.
        """
        device = log_probabilities.device
        result = torch.zeros(len(rows), target_size, device=device)
        whole = [i for i, row in enumerate(rows) if not row.read]
        standing = torch.tensor([rows[i].donor_row for i in whole], device=device)
        plan = self.first.clamp_min(0).to(device)
        result[whole] = result[whole].index_add_(1, plan, log_probabilities[standing].exp())
        edges = [(i, row.donor_row, *self.after(row.read)) for i, row in enumerate(rows) if row.read]
        if edges:
            counts = torch.tensor([len(tokens) for _, _, tokens, _ in edges])
            i = torch.tensor([edge[0] for edge in edges]).repeat_interleave(counts).to(device)
            donor_rows = torch.tensor([edge[1] for edge in edges]).repeat_interleave(counts).to(device)
            tokens, nexts = (torch.cat([edge[k] for edge in edges]).to(device) for k in (2, 3))
            # relative to the likeliest of a row, which may itself be very unlikely: rows are normalised below
            values = log_probabilities[donor_rows, tokens]
            top = torch.full((len(rows),), -torch.inf, device=device).scatter_reduce_(0, i, values, "amax")
            result.index_put_((i, nexts), (values - top[i]).exp(), accumulate=True)
        for i, row in enumerate(rows):
            if row.steps:
                places = torch.arange(row.donor_row, row.donor_row + len(row.steps), device=device)
                along = log_probabilities[places, torch.tensor(row.steps, device=device)]
                mass, token = along.sum().exp(), text.target_ids[row.target_row + 1]
                begun = self.pieces[row.steps[0]]
                if begun:  # what goes on to the longer token no longer counts for its beginning
                    result[i, begun[0]] = (result[i, begun[0]] - mass).clamp_min(0)
                result[i, token] += mass
        return result / result.sum(dim=1, keepdim=True).clamp_min(1e-30)


def spell(target: PreTrainedTokenizerBase, donor: PreTrainedTokenizerBase, donor_size: int) -> Spelling:
    """Spell every donor token in the target's tokens.

    Args:
        target, donor (`PreTrainedTokenizerBase`): tokenizers.
        donor_size (`int`): rows of the donor's head, which may exceed its vocabulary.
    """
    same, rest = spoken_tokens(target, donor)
    pieces: list[tuple[int, ...]] = [()] * donor_size
    for index, token in same.items():
        pieces[index] = (token,)
    coded = target(list(rest.values()), add_special_tokens=False)["input_ids"] if rest else []
    for index, ids in zip(rest, coded):
        pieces[index] = tuple(ids)
    return Spelling(tuple(pieces))
