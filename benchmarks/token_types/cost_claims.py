"""The claim of `benchmarks/results/token_types_cost.json`, from its rows alone."""

from __future__ import annotations

from benchmarks._results import claim


def claims(rows: list[dict]) -> list[dict]:
    """What three types cost in time."""
    ratios = [r["value"] for r in rows if r["metric"] == "three_types_time_ratio" and r["value"] is not None]
    noise = [abs(r["value"] - 1) for r in rows if r["metric"] == "one_type_time_ratio"]
    how = "seconds of the linear layers of a block with three types over one type, the worst of the sizes"
    if noise:
        how += f"; two copies with one type differ by up to {max(noise):.3f}"
    return [claim("token_types.three_types_time_ratio", max(ratios), "<=", 1.02, how)] if ratios else []
