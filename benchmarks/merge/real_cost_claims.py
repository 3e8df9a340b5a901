"""The claims of `real_cost.py`, derived from its rows and nothing else."""

from __future__ import annotations

from benchmarks._results import claim


def claims(rows: list[dict]) -> list[dict]:
    """Time and memory where they were measured on a CPU, and what the gate leaves of alpha for a random donor."""

    def found(metric: str, **fields: str) -> list[float]:
        return [row["value"] for row in rows if row["metric"] == metric and fields.items() <= row.items()]

    made = []
    if minutes := found("minutes", device="cpu"):
        (peak,) = found("peak resident GB", device="cpu")
        made = [
            claim("merge.cpu_minutes", sum(minutes), "<=", 10, "plan plus merge, wall clock"),
            claim("merge.cpu_peak_gb", peak, "<=", 6, "peak resident size of the process over plan and merge"),
        ]
    (alpha,), (threshold,) = found("recipe alpha"), found("confidence below which the gate closes")
    random = found("confidence", donor="random")
    left = alpha * sum(value >= threshold for value in random) / len(random)
    how = f"mean effective alpha over tensor groups, recipe alpha {alpha:g}"
    return [*made, claim("merge.random_donor_gate_alpha", left, "<=", 0.001, how)]
