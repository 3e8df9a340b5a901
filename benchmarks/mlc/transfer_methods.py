"""The runs of `transfer.py`: what each method, and each point of the map, sets.

Names that start with `mlc_` are options of the trainer; `shuffled`, `learning_rate` and `lora` are of the run.
"""

from __future__ import annotations


ALIGNED, OURS, SHUFFLED = "aligned", "ours", "ours.shuffled"
PLAIN = {"mlc_weight": 1.0, "mlc_layer": "auto", "mlc_every": 1}
LANGUAGE = {**PLAIN, "mlc_center": "language", "mlc_extractor_dim": 0, "mlc_repulsion": 1.0}
COMMON = {**LANGUAGE, "mlc_center": "common", "mlc_signed": True}
RAW = {**LANGUAGE, "mlc_center": "none", "mlc_repulsion_temperature": 0.05}
CANDIDATES = {  # the most important first
    "language": LANGUAGE,
    "common": COMMON,
    "language,weight=3": {**LANGUAGE, "mlc_weight": 3.0},
    "common,weight=3": {**COMMON, "mlc_weight": 3.0},
    "language,last": {**LANGUAGE, "mlc_layer": -1},
    "common,last": {**COMMON, "mlc_layer": -1},
    "language,cosine": {**LANGUAGE, "mlc_objective": "cosine"},
    "language,repulsion=0.3": {**LANGUAGE, "mlc_repulsion": 0.3},
    "language,temperature=0.5": {**LANGUAGE, "mlc_temperature": 0.5},
    "language,layer=12": {**LANGUAGE, "mlc_layer": 12},
    "plain": PLAIN,
    "language,no-repulsion": {**LANGUAGE, "mlc_repulsion": 0.0},
    "repulsion": RAW,
    "language,mean-pooling": {**LANGUAGE, "mlc_pooling": "mean"},
    "language,extractor=512": {**LANGUAGE, "mlc_extractor_dim": 512},
    "language,weight=0.3": {**LANGUAGE, "mlc_weight": 0.3},
    "common,unsigned": {**COMMON, "mlc_signed": False},
    "published": {"mlc_weight": 0.8, "mlc_layer": -1, "mlc_every": 2},
}
DEFAULT = "language"  # what `ours` is, unless --ours names another


def methods(ours: str) -> dict[str, dict]:
    """The table in order of importance: ours, the run without the term, and the controls."""
    settings = CANDIDATES[ours]
    return {
        ALIGNED: {"mlc_weight": 0.0},
        OURS: settings,
        SHUFFLED: {**settings, "shuffled": True},
        "mlc": PLAIN,
        "mlc.shuffled": {**PLAIN, "shuffled": True},
        "cosine": {**PLAIN, "mlc_objective": "cosine"},
        "common" if ours.startswith("language") else "language": COMMON if ours.startswith("language") else LANGUAGE,
    }


def map_points(rates: tuple[float, ...]) -> dict[str, dict]:
    """One run for each candidate, and the default at other learning rates, each with its own run without the term."""
    found = {ALIGNED: {"mlc_weight": 0.0}}
    for rate in rates:
        found[f"{ALIGNED},rate={rate}"] = {"mlc_weight": 0.0, "learning_rate": rate}
        found[f"{DEFAULT},rate={rate}"] = {**CANDIDATES[DEFAULT], "learning_rate": rate}
    return {**found, **CANDIDATES}
