"""The claims of `exactness.py`, derived from its rows and nothing else."""

from __future__ import annotations

from tools.result_files import claim


def claims(rows: list[dict]) -> list[dict]:
    """One claim per re-parameterised copy; rows with a `preset` measure other arithmetic and claim nothing."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        if "preset" not in row:
            errors.setdefault(row["donor"], []).append(row["value"])
    how = "largest relative error over families, of logits and of any weight"
    return [
        claim(f"merge.exact.{copy.replace(' ', '_')}", max(values), "<=", 1e-5, how) for copy, values in errors.items()
    ]
