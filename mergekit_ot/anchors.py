"""Rows that correspond across two tokenizers: positions where a token ends at the same character in both.

A causal model's state at such a position has read exactly the same text in both models, so rows match one to one
without pooling. Positions near the start are skipped: they act as attention sinks and say little about the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: Files that hold a vocabulary, one of which a checkpoint folder needs.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


class CalibrationError(ValueError):
    """The calibration text cannot carry this pair; the message says what is missing and how much of it."""


@dataclass(frozen=True)
class MatchedText:
    """One text in both tokenizations.

    Args:
        target_ids, donor_ids (`list[int]`): token ids, special tokens included.
        target_rows, donor_rows (`list[int]`): matched positions, equally many, increasing.
    """

    target_ids: list[int]
    donor_ids: list[int]
    target_rows: list[int]
    donor_rows: list[int]


def require_tokenizer_files(folder: Path) -> None:
    """Refuse a checkpoint folder without a vocabulary: transformers would make an empty tokenizer of it."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CalibrationError(
            f"{folder} holds no tokenizer ({', '.join(VOCABULARIES)}); copy its model's tokenizer files there."
        )


def require_fast(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse tokenizers that cannot report character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise CalibrationError(
            f"{name} has no fast tokenizer; matching rows needs its character offsets. Convert it "
            "(`tokenizer.json`) or choose another checkpoint."
        )


def end_positions(offsets: Sequence[tuple[int, int]], skip: int) -> dict[int, int]:
    """Map the character at which a token ends to the position of the last token ending there.

    Empty spans (special tokens) are ignored, and the last of several tokens that share one character wins, because
    only it has read the whole character.
    """
    return {end: i for i, (start, end) in enumerate(offsets) if i >= skip and end > start}


def match_text(
    text: str,
    target: PreTrainedTokenizerBase,
    donor: PreTrainedTokenizerBase,
    *,
    max_length: int = 256,
    skip: int = 3,
) -> MatchedText:
    """Tokenize a text for both models and match positions.

    Args:
        text (`str`): the text.
        target, donor (`PreTrainedTokenizerBase`): fast tokenizers.
        max_length (`int`, *optional*, defaults to 256): tokens kept on each side.
        skip (`int`, *optional*, defaults to 3): leading positions ignored on each side.

    Returns:
        [`MatchedText`]; its row lists may be empty.
    """
    sides = []
    for tokenizer in (target, donor):
        coded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=max_length)
        sides.append((list(coded["input_ids"]), end_positions(coded["offset_mapping"], skip)))
    (target_ids, target_ends), (donor_ids, donor_ends) = sides
    shared = sorted(target_ends.keys() & donor_ends.keys())
    return MatchedText(target_ids, donor_ids, [target_ends[e] for e in shared], [donor_ends[e] for e in shared])


def match_texts(
    texts: Sequence[str],
    target: PreTrainedTokenizerBase,
    donor: PreTrainedTokenizerBase,
    *,
    rows: int,
    rows_needed: int,
    max_length: int = 256,
    skip: int = 3,
    seed: int = 0,
) -> list[MatchedText]:
    """Match texts in seeded order until `rows` positions are found.

    Args:
        rows (`int`): rows wanted; the last text may exceed it.
        rows_needed (`int`): rows below which the widths of this pair cannot be estimated.

    Raises:
        [`CalibrationError`]: when fewer than `rows_needed` rows are found; says how many there are and are needed.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    matched, found = [], 0
    for i in order:
        pair = match_text(texts[i], target, donor, max_length=max_length, skip=skip)
        if pair.target_rows:
            matched.append(pair)
            found += len(pair.target_rows)
        if found >= rows:
            break
    if found < rows_needed:
        raise CalibrationError(
            f"The calibration text gives {found} matched rows from {len(texts)} texts, but the widths of this pair "
            f"need at least {rows_needed}. Add text, or raise calibration.samples or calibration.max_length."
        )
    return matched
