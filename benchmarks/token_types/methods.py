"""What is compared, as fields of `FreeActConfig`; an ablation is a method with one field changed."""

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
# ours with one grid per weight row and token, as everything above has; and the default, with grids of few numbers
OURS: dict[str, dict] = {"freeact-fast": {"preset": "freeact-fast"}, "freeact": {"preset": "freeact"}}
TIERS: dict[str, dict] = {"freeact-fastest": {"preset": "freeact-fastest"}, **OURS}
GROUPS = {"weight_group_size": 32, "activation_group_size": 16}
# what the published methods gain from the same grids
CONTROLS: dict[str, dict] = {
    "flatquant groups": {"preset": "flatquant", **GROUPS},
    "freeact-paper groups": {"preset": "freeact-paper", **GROUPS},
}
_FAST = {"preset": "freeact-fast"}
_FITTED = {"transform": "kronecker", "channel_scale": "closed_form"}
ABLATIONS: dict[str, dict] = {
    "freeact-fast calibration=learned": {**_FAST, "calibration": "learned"},
    "freeact-fast transform=kronecker": {**_FAST, **_FITTED},
    "freeact-fast types=text+sink": {**_FAST, "token_types": ["text", "sink"]},
    "freeact-fast types=text": {**_FAST, "token_types": ["text"]},
    "freeact-fast centring=shared": {**_FAST, "centring": "shared"},
    "freeact-fast centring=none": {**_FAST, "centring": "none"},
    "freeact-fast loudness_limit=None": {**_FAST, "loudness_limit": None},
    "freeact-fast loudness_limit=8": {**_FAST, "loudness_limit": 8.0},
    "freeact-fast types=text+sink loudness_limit=None": {
        **_FAST,
        "token_types": ["text", "sink"],
        "loudness_limit": None,
    },
    "freeact-fast types=text+sink centring=none": {**_FAST, "token_types": ["text", "sink"], "centring": "none"},
    "freeact loudness_limit=None": {"preset": "freeact", "loudness_limit": None},
    "freeact-fast low_rank=48": {**_FAST, "low_rank": 48},
    "freeact-fast type_rank=4": {**_FAST, "type_rank": 4},
    "freeact-fast low_rank=12 type_rank=4": {**_FAST, "low_rank": 12, "type_rank": 4},
    "freeact-fast samples=x3": {**_FAST, "times_samples": 3},
    "freeact-fast exclusive=fixed": {**_FAST, "exclusive": "fixed"},
    "freeact-fast exclusive=closed_form": {**_FAST, "exclusive": "closed_form"},
    "freeact-fast attention_compensation=True": {**_FAST, "attention_compensation": True},
    "freeact-fast error_correction=True": {**_FAST, "error_correction": True},
    "freeact-fast discovered_types=16": {**_FAST, "discovered_types": 16},
    "freeact-fast low_rank=0 discovered_types=16": {**_FAST, "low_rank": 0, "discovered_types": 16},
    "freeact low_rank=0": {"preset": "freeact", "low_rank": 0},
    "freeact centring=none": {"preset": "freeact", "centring": "none"},
    "quarot attention_compensation=True": {"preset": "quarot", "attention_compensation": True},
    "freeact-paper exclusive=none": {"preset": "freeact-paper", "exclusive": "none"},
    "freeact-fast transform=kronecker calibration=learned": {
        **_FAST,
        **_FITTED,
        **{"calibration": "learned", "learned_part": "maps"},
    },
}
METHODS = {**PUBLISHED, **TIERS, **CONTROLS, **ABLATIONS}
CLAIMED = ("flatquant", "freeact-paper", *OURS)
LEARNED = tuple(
    name
    for name, fields in METHODS.items()
    if fields.get("calibration") == "learned" or fields["preset"] in ("flatquant", "freeact-paper")
)
EARLY = (  # ablations that say where the difference comes from
    "freeact-fast loudness_limit=None",
    "freeact-fast types=text+sink",
    "freeact-fast types=text+sink loudness_limit=None",
    "freeact-fast centring=none",
    "freeact loudness_limit=None",
    "freeact-fast types=text+sink centring=none",
    "freeact-fast types=text",
    "freeact-paper exclusive=none",
)
DRAWS_NOTHING = ("rtn", "smoothquant")  # one seed is all there is, but for the calibration samples


def group_of(method: str) -> str:
    """`method`, `control` or `ablation`."""
    return "ablation" if method in ABLATIONS else "control" if method in CONTROLS else "method"


def bits(setting: str) -> dict[str, int]:
    """`w4a4kv4` as fields of the config."""
    found = re.fullmatch(r"w(\d+)a(\d+)(?:kv(\d+))?", setting)
    if found is None:
        raise ValueError(f"A setting is like w4a4 or w4a4kv4, got {setting!r}.")
    weight, activation, cache = found.groups()
    return {"weight_bits": int(weight), "activation_bits": int(activation), "kv_bits": int(cache or 16)}
