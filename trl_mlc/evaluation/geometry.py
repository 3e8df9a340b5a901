"""Which prompts lie where: retrieval between languages, centred cosine, and the collapse alarm.

Raw cosine between translations is highest exactly where retrieval is at chance, because a common offset dominates
both; so every similarity here is taken after subtracting each language's mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def centred_units(states: torch.Tensor) -> torch.Tensor:
    """Unit vectors `(n, d)` of one language's states after subtracting their mean, in float64."""
    states = states.double()
    return F.normalize(states - states.mean(0), dim=-1)


def retrieval_at_1(queries: torch.Tensor, keys: torch.Tensor) -> float:
    """Share of queries whose nearest key, by cosine, is their own translation.

    Args:
        queries (`torch.Tensor` of shape `(n, d)`): unit vectors of one language.
        keys (`torch.Tensor` of shape `(n, d)`): of another; row `i` translates query `i`.

    Returns:
        `float` in `[0, 1]`; chance is `1 / n`.
    """
    nearest = (queries @ keys.T).argmax(1)
    return (nearest == torch.arange(len(queries), device=queries.device)).double().mean().item()


def translation_cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean cosine between unit vectors `(n, d)` that translate each other."""
    return (first * second).sum(1).mean().item()


def cross_prompt_cosine(states: torch.Tensor) -> float:
    """Mean cosine between *different* prompts of one language, not centred: towards 1 means collapse.

    Args:
        states (`torch.Tensor` of shape `(n, d)`), at least two.
    """
    units = F.normalize(states.double(), dim=-1)
    n = len(units)
    return ((units.sum(0).square().sum() - n) / (n * (n - 1))).item()


def language_geometry(states: dict[str, torch.Tensor], anchor: str) -> dict[str, dict[str, float]]:
    """Per language against the anchor: centred cosine, retrieval both ways, cross-prompt cosine.

    Args:
        states (`dict[str, torch.Tensor]`): `(n, d)` per language, row `i` the same prompt in all of them.
        anchor (`str`): a key of `states`.

    Returns:
        `dict[str, dict[str, float]]` by language, the anchor included (with its cross-prompt cosine only).

    Raises:
        `ValueError`: for an unknown anchor, or fewer than two prompts.
    """
    if anchor not in states:
        raise ValueError(f"anchor {anchor!r} is not one of the languages {sorted(states)}.")
    if len(states[anchor]) < 2:
        raise ValueError("Retrieval needs at least two prompts.")
    units = {language: centred_units(s) for language, s in states.items()}
    found = {}
    for language, own in units.items():
        found[language] = {"cross_prompt_cosine": cross_prompt_cosine(states[language])}
        if language != anchor:
            forth, back = retrieval_at_1(units[anchor], own), retrieval_at_1(own, units[anchor])
            found[language] |= {"retrieval_at_1": (forth + back) / 2}
            found[language] |= {"centred_cosine": translation_cosine(units[anchor], own)}
    return found
