"""The claims of `h100.py`, derived from its rows and nothing else."""

from __future__ import annotations

from tools.result_files import claim


def claims(rows: list[dict]) -> list[dict]:
    """Time and memory of the full shapes on a GPU; miniature runs and runs elsewhere claim nothing."""
    rows = [row for row in rows if row["shapes"] == "8b to 1b"]
    seconds = [row["value"] for row in rows if row["metric"] == "seconds"]
    values = {row["metric"]: row["value"] for row in rows if row["metric"] != "seconds"}
    if values.get("peak device GB") is None:
        return []
    how = "activations, plans and merge, loading and writing included"
    return [
        claim("merge.h100_minutes_8b_to_1b", sum(seconds) / 60, "<=", 5, how),
        claim("merge.h100_peak_gb", values["peak device GB"], "<=", 24, "peak memory allocated on the device"),
        claim("merge.bundle_gb", values["bundle GB"], "<=", 2, "tensors of the plan bundle"),
    ]
