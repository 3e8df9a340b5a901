"""The claims about `diffusion` and `vlm`, of the last run that measured these two; those about `three_types` stand in
`token_types.json`.
"""

from __future__ import annotations

from benchmarks.token_types import claims as whole


MODELS = ("diffusion", "vlm")


def claims(rows: list[dict]) -> list[dict]:
    """Those claims that name one of the two models."""
    return [entry for entry in whole.claims(rows) if entry["id"].split(".")[1] in MODELS]
