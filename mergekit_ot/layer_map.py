"""Which donor layer feeds which target layer: a strictly monotone map found by dynamic programming on CKA.

Layers are compared by what they add to the stream, not by the stream itself: an identity block leaves the stream as it
was and would look like its neighbour, but it adds nothing and so resembles no one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_ot.costs import centred_gram
from mergekit_ot.rows import RowStore


def layer_similarity(
    target: RowStore, donor: RowStore, n_target: int, n_donor: int, *, max_rows: int = 768, device: str = "cpu"
) -> torch.Tensor:
    """Mean linear CKA of the attention update, the MLP update and the stream between them.

    Args:
        target, donor ([`RowStore`]): matched rows of both models.
        n_target, n_donor (`int`): their layer counts.
        max_rows (`int`, *optional*, defaults to 768): rows compared, evenly spaced.

    Returns:
        `torch.Tensor` of shape `(n_target, n_donor)` in [0, 1].
    """
    step = max(1, target.rows // max_rows)
    total = torch.zeros(n_target, n_donor)
    target_grams = [_grams(target, layer, step, device) for layer in range(n_target)]
    for j in range(n_donor):
        for kind, gram in enumerate(_grams(donor, j, step, device)):
            for i in range(n_target):
                total[i, j] += float((target_grams[i][kind] * gram).sum()) / 3
    return total


def _grams(store: RowStore, layer: int, step: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    before, middle, after = (store.read(f"stream.{2 * layer + k}", device)[::step] for k in range(3))
    normed = middle / middle.square().mean(dim=1, keepdim=True).sqrt()
    return centred_gram(middle - before), centred_gram(after - middle), centred_gram(normed)


def monotone_map(similarity: torch.Tensor) -> list[int | None]:
    """Match layers one to one, in order, at greatest total similarity; only the deeper side may skip.

    Args:
        similarity (`torch.Tensor` of shape `(n_target, n_donor)`): larger is closer.

    Returns:
        `list[int | None]`: the donor layer of every target layer; `None` where a shallower donor has none.
    """
    if similarity.shape[0] > similarity.shape[1]:
        inverse = monotone_map(similarity.T)
        result: list[int | None] = [None] * similarity.shape[0]
        for donor_layer, target_layer in enumerate(inverse):
            if target_layer is not None:
                result[target_layer] = donor_layer
        return result
    n_target, n_donor = similarity.shape
    values = similarity.double().tolist()
    # best[i][j]: best total for the first i target layers using only the first j donor layers.
    best = [[0.0] * (n_donor + 1)] + [[float("-inf")] * (n_donor + 1) for _ in range(n_target)]
    for i in range(1, n_target + 1):
        for j in range(i, n_donor + 1):
            best[i][j] = max(best[i][j - 1], best[i - 1][j - 1] + values[i - 1][j - 1])
    result, j = [None] * n_target, n_donor
    for i in range(n_target, 0, -1):
        while j > i and best[i][j] == best[i][j - 1]:
            j -= 1
        j -= 1
        result[i - 1] = j
    return result


def parse_map(text: str, n_target: int, n_donor: int) -> list[int | None]:
    """Read an explicit map such as `"0:0,1:3"`; target layers that are not named keep their weights.

    Raises:
        `ValueError`: for a malformed entry, a layer that does not exist, or a target layer named twice.
    """
    result: list[int | None] = [None] * n_target
    for entry in text.split(","):
        left, colon, right = entry.strip().partition(":")
        if not colon or not left.strip().isdigit() or not right.strip().isdigit():
            raise ValueError(f"layer_map entries look like 'target:donor', e.g. '0:0,1:3'; got {entry.strip()!r}.")
        i, j = int(left), int(right)
        if i >= n_target or j >= n_donor:
            raise ValueError(f"layer_map {entry.strip()!r}: the target has {n_target} layers, the donor {n_donor}.")
        if result[i] is not None:
            raise ValueError(f"layer_map names target layer {i} twice.")
        result[i] = j
    return result


def matched_pairs(layers: Sequence[int | None]) -> list[tuple[int, int]]:
    """The `(target layer, donor layer)` pairs of a map."""
    return [(i, j) for i, j in enumerate(layers) if j is not None]
