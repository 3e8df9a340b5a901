"""Small measures of error."""

from __future__ import annotations

import torch


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Energy of the difference over the energy of the reference; 0 for two zeros."""
    energy = reference.double().square().sum()
    error = (value.double() - reference.double()).square().sum()
    return float(error / energy) if energy > 0 else float(error)


def sqnr_db(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal to quantization-noise ratio in decibels, `-10 log10` of [`relative_error`]."""
    return float(-10 * torch.log10(torch.tensor(max(relative_error(value, reference), 1e-30))))
