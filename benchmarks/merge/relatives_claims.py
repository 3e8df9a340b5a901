"""The claims of `relatives.py`, derived from its rows and nothing else."""

from __future__ import annotations

from tools.result_files import claim


def claims(rows: list[dict]) -> list[dict]:
    """The largest gap to plain interpolation."""
    gaps = [row["value"] for row in rows if row["metric"] == "gap"]
    how = "largest |loss(merge) - loss(interpolation)| / (loss(target) - loss(interpolation)) over copies and alphas"
    return [claim("merge.relatives.loss_gap_to_interpolation", max(gaps), "<=", 0.01, how)] if gaps else []
