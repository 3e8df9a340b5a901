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


def sqnr_db(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal to quantization-noise ratio in decibels, `-10 log10` of [`relative_error`]; at most 300."""
    return -10 * math.log10(max(relative_error(value, reference), 1e-30))
