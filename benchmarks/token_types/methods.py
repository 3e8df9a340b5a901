"""What is compared, as fields of `FreeActConfig`; an ablation is our method with one field changed."""

from __future__ import annotations

import re


FP = ("fp", "w16a16")
SETTINGS = ("w4a4", "w4a4kv4")
PUBLISHED: dict[str, dict] = {
    "rtn": {"preset": "rtn"},
    "smoothquant": {"preset": "smoothquant"},
    "quarot": {"preset": "quarot"},
    "flatquant": {"preset": "flatquant"},
    "freeact-paper": {"preset": "freeact-paper"},
    # STaR-Quant's two parts on the rotation that its ablation starts from; its own code was not found
    "star-style": {
        "preset": "quarot",
        "token_types": ["text", "auto"],
        "exclusive": "closed_form",
        "attention_compensation": True,
    },
}
OURS: dict[str, dict] = {"freeact": {"preset": "freeact"}}
ABLATIONS: dict[str, dict] = {
    "freeact calibration=learned": {"preset": "freeact", "calibration": "learned"},
    "freeact types=text+sink": {"preset": "freeact", "token_types": ["text", "sink"]},
    "freeact types=text": {"preset": "freeact", "token_types": ["text"]},
    "freeact centring=shared": {"preset": "freeact", "centring": "shared"},
    "freeact centring=none": {"preset": "freeact", "centring": "none"},
    "freeact low_rank=0": {"preset": "freeact", "low_rank": 0},
    "freeact low_rank=0 discovered_types=16": {"preset": "freeact", "low_rank": 0, "discovered_types": 16},
    "freeact discovered_types=16": {"preset": "freeact", "discovered_types": 16},
    "freeact exclusive=fixed": {"preset": "freeact", "exclusive": "fixed"},
    "freeact exclusive=closed_form": {"preset": "freeact", "exclusive": "closed_form"},
    "freeact attention_compensation=True": {"preset": "freeact", "attention_compensation": True},
    "quarot attention_compensation=True": {"preset": "quarot", "attention_compensation": True},
    "freeact-paper exclusive=none": {"preset": "freeact-paper", "exclusive": "none"},
}
METHODS = {**PUBLISHED, **OURS, **ABLATIONS}
LEARNED = ("flatquant", "freeact-paper", "freeact calibration=learned", "freeact-paper exclusive=none")
DRAWS_NOTHING = ("rtn", "smoothquant")  # one seed is all there is, but for the calibration samples


def bits(setting: str) -> dict[str, int]:
    """`w4a4kv4` as fields of the config."""
    found = re.fullmatch(r"w(\d+)a(\d+)(?:kv(\d+))?", setting)
    if found is None:
        raise ValueError(f"A setting is like w4a4 or w4a4kv4, got {setting!r}.")
    weight, activation, cache = found.groups()
    return {"weight_bits": int(weight), "activation_bits": int(activation), "kv_bits": int(cache or 16)}
