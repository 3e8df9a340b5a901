"""Claim of the prompt of an 8B model with `freeact-fast`: the tier of which it was measured last."""

from __future__ import annotations

from benchmarks._results import claim
from benchmarks.speed.claims import BLOCKS_8B, model_values


TIER = "freeact-fast"


def claims(rows: list[dict]) -> list[dict]:
    """How many times faster than bfloat16, each at its best."""
    values = model_values(rows, "prefill_seconds", BLOCKS_8B, TIER)
    if not values:
        return []
    how = f"prefill_seconds, bf16 / {TIER} (the fastest tier was not timed), each at its best; ours with embedding_bits=8"
    return [claim("speed.model8b.prefill", min(values["bf16"]) / min(values[TIER]), ">=", 1.3, how)]
