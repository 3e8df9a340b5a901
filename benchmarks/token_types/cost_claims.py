"""The claim of `benchmarks/results/token_types_cost.json`, from its rows alone, and the statistic that it is made of."""

from __future__ import annotations

import random
from itertools import combinations
from statistics import median, pstdev

from tools.result_files import claim


def ratio(ones: list[float], threes: list[float]) -> float:
    """Seconds of the copies with three types over those with one, medians of both."""
    return median(threes) / median(ones)


def noise(ones: list[float], threes: list[float], draws: int = 500) -> float:
    """Standard deviation of [`ratio`] over copies drawn anew, with putting back."""
    draw = random.Random(0)
    return pstdev(ratio(draw.choices(ones, k=len(ones)), draw.choices(threes, k=len(threes))) for _ in range(draws))


def halves(ones: list[float]) -> tuple[float, float]:
    """The control: copies with one type against copies with one type. Of all ways to part them in two halves, the slower
    half's median over the other's: the middle one, and the largest.
    """
    found = []
    for chosen in combinations(range(len(ones)), len(ones) // 2):
        a = median(ones[i] for i in chosen)
        b = median(v for i, v in enumerate(ones) if i not in chosen)
        found.append(max(a, b) / min(a, b))
    return median(found), max(found)


def claims(rows: list[dict]) -> list[dict]:
    """What three types cost in time, at worst."""
    spent: dict[tuple, dict[int, list[float]]] = {}
    for row in rows:
        if row["metric"] == "seconds":
            size = spent.setdefault((row["method"], row["shape"], row["tokens"]), {1: [], 3: []})
            size[row["types"]].append(row["value"])
    if not spent:
        return []
    found = {size: ratio(kinds[1], kinds[3]) for size, kinds in spent.items()}
    worst = max(found, key=found.__getitem__)
    presets = " and ".join(dict.fromkeys(preset for preset, *_ in found))
    control = max(halves(kinds[1])[0] for kinds in spent.values())
    how = (
        f"seconds of a block's linear layers with three types over one, the worst of {len(found)} sizes of {presets}: "
    )
    how += f"{worst[0]}, {worst[1]}, {worst[2]} tokens; halves of the copies with one type differ by {control - 1:.3f} at worst"
    return [claim("token_types.three_types_time_ratio", found[worst], "<=", 1.02, how)]
