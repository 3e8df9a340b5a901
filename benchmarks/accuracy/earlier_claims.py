"""What `accuracy_fourth`, measured with the default before the present one, still claims: what was not measured again since."""

from __future__ import annotations

from benchmarks.accuracy.claims import claims as all_claims


KEPT = ("accuracy.qwen2.5.w4a4.learned_excess_over_flatquant",)


def claims(rows: list[dict]) -> list[dict]:
    """The claims named in `KEPT`."""
    return [entry for entry in all_claims(rows) if entry["id"] in KEPT]
