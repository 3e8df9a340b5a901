"""The claims of `real_cost.py`, derived from its rows and nothing else."""

from __future__ import annotations

from tools.result_files import claim


def claims(rows: list[dict]) -> list[dict]:
    """Time and memory, where they were measured on a CPU."""

    def found(metric: str, **fields: str) -> list[float]:
        return [row["value"] for row in rows if row["metric"] == metric and fields.items() <= row.items()]

    if not (minutes := found("minutes", device="cpu")):
        return []
    (peak,) = found("peak resident GB", device="cpu")
    return [
        claim("merge.cpu_minutes", sum(minutes), "<=", 10, "plan plus merge, wall clock"),
        claim("merge.cpu_peak_gb", peak, "<=", 6, "peak resident size of the process over plan and merge"),
    ]
