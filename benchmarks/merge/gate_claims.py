"""The claim of `gate.py`, derived from its rows and nothing else."""

from __future__ import annotations

from tools.result_files import claim


def claims(rows: list[dict]) -> list[dict]:
    """What the gate leaves of alpha for random donors, mean over their blocks."""
    values = {row["metric"]: row["value"] for row in rows if row["metric"] != "confidence"}
    alpha, threshold = values["recipe alpha"], values["confidence below which the gate closes"]
    found = [row["value"] for row in rows if row["metric"] == "confidence"]
    if not found:
        return []
    left = alpha * sum(value >= threshold for value in found) / len(found)
    how = f"mean effective alpha over {len(found)} blocks of random donors, recipe alpha {alpha:g}"
    return [claim("merge.random_donor_gate_alpha", left, "<=", 0.001, how)]
