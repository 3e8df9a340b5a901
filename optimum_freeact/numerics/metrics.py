"""Small measures of error."""

from __future__ import annotations

import math

import torch


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Energy of the difference over the energy of the reference; 0 for two zeros, infinite for a zero reference only.

    Raises:
        `ValueError`: if the shapes differ.
    """
    if value.shape != reference.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}, reference {tuple(reference.shape)}; they must agree.")
    energy = reference.double().square().sum()
    error = (value.double() - reference.double()).square().sum()
    return 0.0 if energy == 0 and error == 0 else float(error / energy)


def relative_error_of_types(value: torch.Tensor, reference: torch.Tensor, types: torch.Tensor | None) -> float:
    """[`relative_error`] of each token type by itself, averaged by how many tokens each has.

    Over all tokens together the attention sink, a thousand times louder than the others, would be all that counts.

    Args:
        value, reference (`torch.Tensor` of shape `(..., d)`): What is measured, and what it should be.
        types (`torch.Tensor` of shape `(...)`, *optional*): Token types; one type where absent or of another shape.
    """
    if types is None or types.shape != reference.shape[:-1]:
        return relative_error(value, reference)
    types = types.to(reference.device)
    rows = [types == kind for kind in types.unique()]
    return sum(float(row.double().mean()) * relative_error(value[row], reference[row]) for row in rows)


def relative_error_of_tokens(error: torch.Tensor, reference: torch.Tensor, types: torch.Tensor) -> float:
    """Mean over types of the mean over their tokens of the error's share of the token's own energy.

    So the quiet part of a type counts as much as its loud part. The quietest tokens count as a hundredth of their type's median.

    Args:
        error, reference (`torch.Tensor` of shape `(n, d)`): What a value is off, and what it should be.
        types (`torch.Tensor` of shape `(n,)`): Token types.
    """
    found = []
    for kind in types.unique():
        lost, energy = error[types == kind].square().sum(1), reference[types == kind].square().sum(1)
        found.append(float((lost / energy.clamp_min(0.01 * float(energy.median()) + 1e-30)).mean()))
    return sum(found) / len(found)


def sqnr_db(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal to quantization-noise ratio in decibels, `-10 log10` of [`relative_error`]; at most 300."""
    return -10 * math.log10(max(relative_error(value, reference), 1e-30))
