"""The claims of `step_cost.py`, derived from its rows and nothing else."""

from __future__ import annotations

import statistics

from tools.result_files import claim


def ratio(rows: list[dict], variant: str, metric: str) -> float | None:
    """Mean of a variant over the least of the stock trainer in the same run; `None` if one was not measured.

    The least, since whoever runs first may pay for shapes that others find ready: it must not be us who gain by that.
    """

    def found(name: str) -> list[float]:
        return [r["value"] for r in rows if (r["variant"], r["metric"]) == (name, metric) and r["value"] is not None]

    ours, stock = found(variant), found("stock")
    return statistics.fmean(ours) / min(stock) if ours and stock else None


def claims(rows: list[dict]) -> list[dict]:
    """The issue's three ratios."""
    wanted = [
        ("mlc.step_cost.default", "default", "seconds_per_step", 1.6),
        ("mlc.step_cost.three_languages", "three-languages", "seconds_per_step", 1.25),
        ("mlc.peak_memory", "default", "peak_bytes", 1.15),
    ]
    ratios = [
        (name, ratio(rows, variant, metric), target, variant, metric) for name, variant, metric, target in wanted
    ]
    return [
        claim(name, value, "<=", target, f"{metric}[{variant}] / least {metric}[stock], same run")
        for name, value, target, variant, metric in ratios
        if value is not None
    ]
