"""The runs of `transfer.py`: what each method, and each point of the map, sets.

Names that start with `mlc_` are options of the trainer; `shuffled`, `learning_rate` and `lora` are of the run.
"""

from __future__ import annotations


ALIGNED, OURS, SHUFFLED = "aligned", "ours", "ours.shuffled"
BASE = "base"  # the untrained model, and the constant answer
PLAIN = {"mlc_weight": 1.0, "mlc_layer": "auto", "mlc_every": 1}
LANGUAGE = {**PLAIN, "mlc_center": "language", "mlc_extractor_dim": 0, "mlc_repulsion": 1.0}
COMMON = {**LANGUAGE, "mlc_center": "common", "mlc_signed": True}
LAST = {**COMMON, "mlc_layer": -1}
CANDIDATES = {  # the most important first
    "last": LAST,
    "last,weight=3": {**LAST, "mlc_weight": 3.0},
    "last,language": {**LANGUAGE, "mlc_layer": -1},
    "last,weight=0.3": {**LAST, "mlc_weight": 0.3},
    "auto": COMMON,
    "auto,language": LANGUAGE,
    "last,cosine": {**LAST, "mlc_objective": "cosine"},
    "last,no-repulsion": {**LAST, "mlc_repulsion": 0.0},
    "auto,weight=3": {**COMMON, "mlc_weight": 3.0},
    "last,temperature=0.5": {**LAST, "mlc_temperature": 0.5},
    "last,unsigned": {**LAST, "mlc_signed": False},
    "last,not-centred": {**LAST, "mlc_center": "none", "mlc_repulsion_temperature": 0.05},
    "last,extractor=512": {**LAST, "mlc_extractor_dim": 512},
    "layer=12": {**COMMON, "mlc_layer": 12},
    "auto,mean-pooling": {**COMMON, "mlc_pooling": "mean"},
    "plain": PLAIN,
    "published": {"mlc_weight": 0.8, "mlc_layer": -1, "mlc_every": 2},
}
DEFAULT = "last"  # what `ours` is, unless --ours names another


def methods(ours: str) -> dict[str, dict]:
    """The table in order of importance: ours, the run without the term, and the controls."""
    settings = CANDIDATES[ours]
    return {
        ALIGNED: {"mlc_weight": 0.0},
        OURS: settings,
        SHUFFLED: {**settings, "shuffled": True},
        BASE: {},
        "cosine": {**PLAIN, "mlc_objective": "cosine"},
        "mlc": PLAIN,
        "mlc.shuffled": {**PLAIN, "shuffled": True},
    }


def map_points(rates: tuple[float, ...]) -> dict[str, dict]:
    """One run for each candidate, and the default at other learning rates, each with its own run without the term."""
    found = {ALIGNED: {"mlc_weight": 0.0}}
    for rate in rates:
        found[f"{ALIGNED},rate={rate}"] = {"mlc_weight": 0.0, "learning_rate": rate}
        found[f"{DEFAULT},rate={rate}"] = {**CANDIDATES[DEFAULT], "learning_rate": rate}
    return {**found, **CANDIDATES, BASE: {}}
