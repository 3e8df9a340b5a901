"""What an alpha setting means for each tensor: mergekit's own rules, said before any long work.

A filter that no tensor's name contains changes nothing, and tensors that no entry of a list covers take the default: both
are mergekit's rules, and both are easy to write by mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mergekit_ot.structure import split_name


#: Alpha of tensors that no entry of a list covers, and of recipes without one.
DEFAULT_ALPHA = 0.1


def alpha_at(setting: Any, name: str, depth: float) -> float:
    """Alpha of a tensor.

    Args:
        setting (`Any`): number, gradient over depth, `{filter, value}` or a list of those.
        name (`str`): checkpoint name of the tensor.
        depth (`float`): from 0 for the first layer to 1 for the last.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return float(str(setting))
    if not all(isinstance(item, dict) for item in setting):
        values, place = [float(item) for item in setting], depth * (len(setting) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (place - low) * (values[high] - values[low])
    for item in setting:
        if item.get("filter") in (None, "*") or item["filter"] in name:
            return alpha_at(item["value"], name, depth)
    return DEFAULT_ALPHA


def unmatched_filters(setting: object, names: Iterable[str]) -> list[str]:
    """Filters of a setting that no tensor's name contains, in order."""
    items = setting if isinstance(setting, list) else [setting]
    filters = [item.get("filter") for item in items if isinstance(item, dict)]
    names = list(names)
    return [text for text in filters if text not in (None, "*") and not any(text in name for name in names)]


def alpha_ranges(setting: object, names: Sequence[str], n_layers: int) -> dict[str, tuple[float, float]]:
    """Smallest and largest alpha over the weights of all attention and all MLP blocks."""
    found: dict[str, list[float]] = {"attn": [], "mlp": []}
    for name in names:
        place = split_name(name)
        block = place and {"self_attn": "attn", "mlp": "mlp"}.get(place[1].partition(".")[0])
        if place and block and name.endswith("_proj.weight"):
            found[block].append(alpha_at(setting, name, place[0] / max(n_layers - 1, 1)))
    return {block: (min(values), max(values)) for block, values in found.items() if values}
