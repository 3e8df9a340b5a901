"""Do preferences hold in every language? Margins of answers under translated prompts, and what they say.

A margin is `log p(chosen | prompt) - log p(rejected | prompt)`: no judge and no generation. Answers stay in the anchor
language unless a row brings its own; a constant preference wins everywhere, so rows should differ in which answer is
right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.no_grad()
def completion_log_probs(model, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int = 16) -> torch.Tensor:
    """Sum of log-probabilities of completions given prompts.

    Args:
        model: a causal language model, in evaluation mode.
        pairs (`Sequence[tuple[list[int], list[int]]]`): token ids of prompt and completion.
        batch_size (`int`, *optional*, defaults to 16).

    Returns:
        `torch.Tensor` of shape `(len(pairs),)`, float64, on the CPU.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    found = torch.zeros(len(pairs), dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = max(sum(map(len, pairs[i])) for i in part)
        tail = max(len(pairs[i][1]) for i in part)
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for r, i in enumerate(part):  # left padded, so that all completions end together
            prompt, completion = pairs[i]
            row = torch.tensor(prompt + completion)
            ids[r, longest - len(row) :], mask[r, longest - len(row) :] = row, 1
            labels[r, longest - len(completion) :] = row[len(prompt) :]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        kept = {"logits_to_keep": tail + 1}
        logits = model(
            ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device), use_cache=False, **kept
        ).logits[:, :-1]
        wanted = labels[:, -tail:].to(logits.device)
        scores = torch.log_softmax(logits.float(), -1).gather(2, wanted.clamp_min(0).unsqueeze(2)).squeeze(2)
        found[torch.tensor(part)] = (scores * wanted.ne(-100)).sum(1).double().cpu()
    return found


def accuracies(margins: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Share of prompts `(n, L)` whose chosen answer is the likelier one, per language `(L,)`; ties count half."""
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    return (right * present).sum(0) / present.sum(0)


def variance_x100(values: torch.Tensor) -> float:
    """Population variance between languages, times 100: the paper's Var (recomputed from its table to 0.01)."""
    return 100 * values.double().var(unbiased=False).item()


def anchor_agreement(margins: torch.Tensor, present: torch.Tensor, anchor: int) -> torch.Tensor:
    """Share of prompts decided as in the anchor language, right or wrong, per language `(L,)`."""
    both = present & present[:, anchor : anchor + 1]
    same = (margins > 0) == (margins[:, anchor : anchor + 1] > 0)
    return (same & both).sum(0).double() / both.sum(0)


def pairwise_agreement(margins: torch.Tensor, present: torch.Tensor) -> float:
    """Mean over unordered pairs of *different* languages of the share of prompts decided alike.

    The paper's PAG is not this: its printed value exceeds what its own marginals allow for it, and its formula is not
    given. Chance for fair independent decisions is 0.5.
    """
    languages = margins.shape[1]
    shares = []
    for a in range(languages):
        for b in range(a + 1, languages):
            both = present[:, a] & present[:, b]
            if both.any():
                shares.append(((margins[:, a] > 0) == (margins[:, b] > 0))[both].double().mean())
    return torch.stack(shares).mean().item() if shares else float("nan")


def perplexity(model, texts: Sequence[list[int]], batch_size: int = 16) -> float:
    """Exponential of the mean token loss of token-id lists; the first token of each is given, not scored."""
    pairs = [(ids[:1], ids[1:]) for ids in texts if len(ids) >= 2]
    total = completion_log_probs(model, pairs, batch_size).sum()
    return torch.exp(-total / sum(len(completion) for _, completion in pairs)).item()
