"""What the tokens of two vocabularies spell: those that correspond, and the text of those that don't."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Marks of a leading space and a newline in byte-level and sentencepiece vocabularies.
MARKS = {"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"}


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Text of every ordinary token; special tokens are left out."""
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    texts = {}
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            for mark, text in MARKS.items():
                token = token.replace(mark, text)
            texts[index] = token
    return texts


def shared_tokens(
    target: PreTrainedTokenizerBase, donor: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the tokens that spell the same text in both vocabularies, `(n,)` each, in target order."""
    by_text = {text: index for index, text in token_texts(donor).items()}
    pairs = sorted((i, by_text[text]) for i, text in token_texts(target).items() if text in by_text)
    ids = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


def spoken_tokens(
    target: PreTrainedTokenizerBase, donor: PreTrainedTokenizerBase
) -> tuple[dict[int, int], dict[int, str]]:
    """Donor tokens with the target token that spells the same, and the text of those that have none."""
    target_ids, donor_ids = shared_tokens(target, donor)
    same = dict(zip(donor_ids.tolist(), target_ids.tolist()))
    rest = {i: _spoken(donor, i, text) for i, text in token_texts(donor).items() if i not in same}
    return same, {i: text for i, text in rest.items() if text}


def _spoken(tokenizer: PreTrainedTokenizerBase, index: int, text: str) -> str:
    """Text of a token as its own tokenizer decodes it; empty for fragments of a character."""
    if text.isascii():
        return text
    token = tokenizer.convert_ids_to_tokens(index)
    decoded = text if "▁" in token else tokenizer.convert_tokens_to_string([token])
    return "" if "\ufffd" in decoded else decoded
