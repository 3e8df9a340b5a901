"""How much of a match is the donor's knowledge: held-out correlation above what the same block finds with random weights.

Matching thousands of channels finds some correlation by chance, which held-out rows expose, and some because any network,
even an untrained one, computes features of the same text, which only a null network exposes. The null here keeps the
donor's stream and draws the block's weights at random. A donor that was never trained equals its null; a relative
of the target is far above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from mergekit_ot.costs import correlation, standardise


#: Draws of the null network, and rows and channels compared with it: enough for a standard error of about 0.004.
NULL_DRAWS, NULL_ROWS, NULL_CHANNELS = 4, 1024, 256


@dataclass(frozen=True)
class Confidence:
    """Evidence that matched channels correspond because of what the donor's weights hold.

    Args:
        fitted (`float`): mean correlation of matched channels on the rows they were matched on.
        held_out (`float`): the same on held-out rows.
        null (`float`): what the block with random weights reaches on held-out rows: mean over draws plus three standard
            deviations, at least 0.
        value (`float`): `(held_out - null) / (fitted - null)`, clipped to [0, 1].
    """

    fitted: float
    held_out: float
    null: float
    value: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON form."""
        return asdict(self)


def compare_with_null(real: tuple[float, float], null: Sequence[tuple[float, float]]) -> Confidence:
    """Confidence from `(fitted, held_out)` correlations of the donor and of several draws of its null."""
    held = torch.tensor([held_out for _, held_out in null], dtype=torch.float64)
    floor = max(float(held.mean() + 3.0 * held.std()), 0.0)
    span = real[0] - floor
    value = min(max((real[1] - floor) / span, 0.0), 1.0) if real[1] > floor and span > 0 else 0.0
    return Confidence(real[0], real[1], floor, value)


def spaced(count: int, limit: int) -> slice:
    """Evenly spaced positions, at most `limit` of `count`."""
    return slice(None, None, -(-count // limit))


def predicted_correlation(target: torch.Tensor, predicted: torch.Tensor, n_fit: int) -> tuple[float, float]:
    """Mean correlation of every target channel with its prediction, on the leading `n_fit` rows and on the others."""
    parts = (slice(None, n_fit), slice(n_fit, None))
    values = [float((standardise(target[part]) * standardise(predicted[part])).mean()) for part in parts]
    return values[0], values[1]


def partner_correlation(target: torch.Tensor, donor: torch.Tensor, n_fit: int) -> tuple[float, float]:
    """Mean correlation of every target channel with the donor channel that fits it best on the leading rows.

    Args:
        target (`torch.Tensor` of shape `(n_rows, n_target)`): target channels.
        donor (`torch.Tensor` of shape `(n_rows, n_donor)`): donor channels.
        n_fit (`int`): leading rows on which partners are chosen.

    Returns:
        The correlation on those rows and on the others.
    """
    partner = correlation(target[:n_fit], donor[:n_fit]).argmax(dim=1)
    return predicted_correlation(target, donor[:, partner], n_fit)


def random_like(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """Gaussian entries of the weight's own size and spread, on its device."""
    draw = torch.Generator(device=weight.device).manual_seed(seed)
    return torch.randn(weight.shape, generator=draw, device=weight.device, dtype=weight.dtype) * weight.std()
