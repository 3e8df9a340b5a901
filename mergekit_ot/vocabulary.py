"""The plan between two vocabularies: which target token a donor token stands for.

Where a donor token spells the same text as a target token they correspond. Any other donor token is cut by the target's
tokenizer, and its probability belongs to the first piece: that is the token the target would have to predict. The plan
has one entry per donor token, so a donor's next-token distribution becomes one over the target's vocabulary.
"""

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


def vocabulary_plan(target: PreTrainedTokenizerBase, donor: PreTrainedTokenizerBase, donor_size: int) -> torch.Tensor:
    """Target token of every donor token.

    Args:
        target, donor (`PreTrainedTokenizerBase`): tokenizers.
        donor_size (`int`): rows of the donor's head, which may exceed its vocabulary.

    Returns:
        `torch.Tensor` of shape `(donor_size,)`, int64; -1 for special tokens, unused rows and
        fragments of characters.
    """
    plan = torch.full((donor_size,), -1, dtype=torch.long)
    target_ids, donor_ids = shared_tokens(target, donor)
    plan[donor_ids] = target_ids
    rest = [(i, _spoken(donor, i, text)) for i, text in token_texts(donor).items() if plan[i] < 0]
    rest = [(i, text) for i, text in rest if text]
    coded = target([text for _, text in rest], add_special_tokens=False)["input_ids"] if rest else []
    for (i, _), ids in zip(rest, coded):
        if ids:
            plan[i] = ids[0]
    return plan


def _spoken(tokenizer: PreTrainedTokenizerBase, index: int, text: str) -> str:
    """Text of a token as its own tokenizer decodes it; empty for fragments of a character."""
    if text.isascii():
        return text
    token = tokenizer.convert_ids_to_tokens(index)
    decoded = text if "▁" in token else tokenizer.convert_tokens_to_string([token])
    return "" if "\ufffd" in decoded else decoded


def transport_distribution(logits: torch.Tensor, plan: torch.Tensor, target_size: int) -> torch.Tensor:
    """Next-token distribution of the donor, expressed over the target's vocabulary.

    Args:
        logits (`torch.Tensor` of shape `(n, donor_size)`): donor logits.
        plan (`torch.Tensor` of shape `(donor_size,)`): see `vocabulary_plan`.
        target_size (`int`): the target's vocabulary size.

    Returns:
        `torch.Tensor` of shape `(n, target_size)` in float32, rows summing to one.
    """
    kept = (plan >= 0).to(logits.device)
    probabilities = torch.softmax(logits.float().masked_fill(~kept, float("-inf")), dim=-1)
    result = torch.zeros(logits.shape[0], target_size, device=logits.device)
    return result.index_add_(1, plan.clamp_min(0).to(logits.device), probabilities)
