"""The runs of `transfer.py`: what each method of the table, and each point of the map, sets.

A point of the map is called `VARIANT@REGIME`, with `.rows` or `.each` behind the variant for shuffled translations. A
regime says how gently the model is trained, a variant what the term is. Names that start with `mlc_` are options of the
trainer; the others are of the run.
"""

from __future__ import annotations

from collections.abc import Sequence


ALIGNED, OURS, BASE = "aligned", "ours", "base"  # `base` is the untrained model, and the constant answer
SHUFFLED = ("ours.shuffled-each", "ours.shuffled-rows")
CLAIMED = (ALIGNED, OURS, *SHUFFLED)  # what the claims are made of
CONTROLS = {"": {}, ".rows": {"shuffled": "rows"}, ".each": {"shuffled": "each"}}

# DPO at its usual beta of 0.1 goes on until margins are over a hundred nats, long after the rule is learned, and English
# pays for it; at a beta of 1 its loss is gone at about ten. In `words` regimes the embedding has a rate of its own and the
# head, which Gemma ties to it, stays as it was; `half` ends at the mean of the trained and the first weights.
FULL = {"learning_rate": 3e-5, "beta": 1.0}
WORDS = {"learning_rate": 1e-5, "beta": 1.0, "head": "frozen"}
LORA = {"learning_rate": 5e-4, "lora": 32, "beta": 1.0}
REGIMES = {
    "full-1e-5-beta1": {**FULL, "learning_rate": 1e-5},
    "full-2e-5-beta1": {**FULL, "learning_rate": 2e-5},
    "full-3e-5-beta1": FULL,
    "full-5e-5-beta1": {**FULL, "learning_rate": 5e-5},
    "full-2e-5-beta1-200": {**FULL, "learning_rate": 2e-5, "steps": 200},
    "full-3e-5-beta1-200": {**FULL, "steps": 200},
    "full-1e-5-beta1-300": {**FULL, "learning_rate": 1e-5, "steps": 300},
    "full-3e-5-beta3": {**FULL, "beta": 3.0},
    "full-5e-5-beta3": {**FULL, "learning_rate": 5e-5, "beta": 3.0},
    "full-3e-5-beta1-slow": {**FULL, "warmup": 0.5},
    "full-2e-5-beta.3": {**FULL, "learning_rate": 2e-5, "beta": 0.3},
    "full-5e-5-beta1-half": {**FULL, "learning_rate": 5e-5, "kept": 0.5},
    "full-1e-4-beta1-half": {**FULL, "learning_rate": 1e-4, "kept": 0.5},
    "body-3e-5-beta1": {**FULL, "embedding_rate": 0.0},
    "body-1e-4-beta1": {**FULL, "learning_rate": 1e-4, "embedding_rate": 0.0},
    "body-1e-4-beta3": {**FULL, "learning_rate": 1e-4, "embedding_rate": 0.0, "beta": 3.0},
    "body-1e-4-beta3-350-words": {**FULL, "learning_rate": 1e-4, "embedding_rate": 0.0, "beta": 3.0, "concepts": 350},
    "words-1e-4-body-1e-4-beta3-350-words": {
        **WORDS,
        "learning_rate": 1e-4,
        "embedding_rate": 1e-4,
        "beta": 3.0,
        "concepts": 350,
    },
    "body-5e-5-beta1-200": {**FULL, "learning_rate": 5e-5, "embedding_rate": 0.0, "steps": 200},
    "words-1e-4-beta1": {**WORDS, "embedding_rate": 1e-4},
    "words-3e-4-beta1": {**WORDS, "embedding_rate": 3e-4},
    "words-3e-4-beta1-150": {**WORDS, "embedding_rate": 3e-4, "steps": 150},
    "words-3e-4-body-2e-5-beta3": {**WORDS, "learning_rate": 2e-5, "embedding_rate": 3e-4, "beta": 3.0},
    "words-5e-4-body-2e-5-beta3-150": {
        **WORDS,
        "learning_rate": 2e-5,
        "embedding_rate": 5e-4,
        "beta": 3.0,
        "steps": 150,
    },
    "words-3e-4-beta1-200": {**WORDS, "embedding_rate": 3e-4, "steps": 200},
    "words-6e-4-body-5e-5-beta3": {**WORDS, "learning_rate": 5e-5, "embedding_rate": 6e-4, "beta": 3.0},
    "words-6e-4-body-1e-4-beta3": {**WORDS, "learning_rate": 1e-4, "embedding_rate": 6e-4, "beta": 3.0},
    "words-1e-3-body-2e-4-beta3": {**WORDS, "learning_rate": 2e-4, "embedding_rate": 1e-3, "beta": 3.0},
    "words-1e-3-beta1": {**WORDS, "embedding_rate": 1e-3},
    "words-3e-4-body-3e-5-beta1": {**WORDS, "learning_rate": 3e-5, "embedding_rate": 3e-4},
    "words-3e-4-tied-beta1": {**FULL, "learning_rate": 1e-5, "embedding_rate": 3e-4},
    "head-frozen-3e-5-beta1": {**WORDS, "learning_rate": 3e-5},
    "lora32-5e-4-beta1": LORA,
    "lora32-5e-4-beta1-half": {**LORA, "kept": 0.5},
    "lora32-5e-4-beta3": {**LORA, "beta": 3.0},
    "lora8-5e-4-beta1": {**LORA, "lora": 8},
    "lora32-2e-4-beta1": {**LORA, "learning_rate": 2e-4},
    "lora32-5e-4-beta1-50": {**LORA, "steps": 50},
    "lora32-2e-4-beta.3": {**LORA, "learning_rate": 2e-4, "beta": 0.3},
}

SWEPT, SWEEP = "-sweep", (0.0, 0.25, 0.5, 0.75)  # one training, scored at several `kept`

STEP = {"mlc_every": 1, "mlc_languages_per_step": 12, "mlc_weight": 1.0}
BARE = {**STEP, "mlc_layer": -1, "mlc_extractor_dim": 0}
COMMON = {**BARE, "mlc_center": "common", "mlc_signed": True, "mlc_scan_prompts": 24}
TIED = {**COMMON, "mlc_contrast": 1.0, "mlc_anchor_detached": True}
VARIANTS = {  # the most important first
    "tied": TIED,
    "tied,weight=0.3": {**TIED, "mlc_weight": 0.3},
    "repulsion": {**COMMON, "mlc_repulsion": 1.0},
    "tied,layer=15": {**TIED, "mlc_layer": 15},
    "contrast": {**TIED, "mlc_objective": "none"},
    "tied,weight=0.1": {**TIED, "mlc_weight": 0.1},
    "both-move": {**TIED, "mlc_anchor_detached": False},
    "repulsion,weight=0.3": {**COMMON, "mlc_repulsion": 1.0, "mlc_weight": 0.3},
    "repulsion,three": {**COMMON, "mlc_repulsion": 1.0, "mlc_languages_per_step": 3},
    "plain": {**STEP, "mlc_weight": 0.8, "mlc_layer": -1},
    "tied,weight=3": {**TIED, "mlc_weight": 3.0},
    "repulsion,detached": {**COMMON, "mlc_repulsion": 1.0, "mlc_anchor_detached": True},
    "cosine,detached": {**COMMON, "mlc_objective": "cosine", "mlc_anchor_detached": True},
    "tied,three": {**TIED, "mlc_languages_per_step": 3},
    "tied,contrast=3": {**TIED, "mlc_contrast": 3.0},
    "tied,layer=12": {**TIED, "mlc_layer": 12},
    "tied,language": {**TIED, "mlc_center": "language", "mlc_signed": False},
    "tied,not-centred": {**TIED, "mlc_center": "none"},
    "tied,sharp": {**TIED, "mlc_contrast_temperature": 0.03},
    "tied,auto": {**TIED, "mlc_layer": "auto"},
    "tied,extractor=512": {**TIED, "mlc_extractor_dim": 512},
    "tied,unsigned": {**TIED, "mlc_signed": False},
    "tied,thirty": {**TIED, "mlc_languages_per_step": 31},
    "tied,weight=10": {**TIED, "mlc_weight": 10.0},
}
MAIN = "tied"  # what regimes are compared by
LANGUAGES = {  # how many languages are taught, of eighty, and how many of them in each step
    "tied,24": {**TIED, "mlc_languages_per_step": 25},
    "tied,40": {**TIED, "mlc_languages_per_step": 41},
    "tied,24-of-40": {**TIED, "mlc_languages_per_step": 25, "taught": 40},
    "tied,of-40": {**TIED, "taught": 40},
    "tied,of-24": {**TIED, "taught": 24},
}
PLAIN = VARIANTS["plain"]
GUARDED = {  # each guard by itself, on the loss as the paper has it
    "plain,no-extractor": {**PLAIN, "mlc_extractor_dim": 0},
    "plain,frozen": {**PLAIN, "mlc_extractor_frozen": True},
    "plain,language": {**PLAIN, "mlc_center": "language"},
    "plain,repulsion": {**PLAIN, "mlc_repulsion": 1.0},
    "plain,contrast": {**PLAIN, "mlc_contrast": 1.0},
}
LONGER = {"tied,steps=200": {**TIED, "steps": 200}, f"{ALIGNED},steps=200": {"mlc_weight": 0.0, "steps": 200}}
ALONE = {ALIGNED: {"mlc_weight": 0.0}, "guards": {**COMMON, "mlc_repulsion": 1.0, "mlc_objective": "none"}}
POINTS = {**VARIANTS, **GUARDED, **LANGUAGES, **LONGER, **ALONE}


def point(name: str) -> dict:
    """Settings of a point of the map, by its name."""
    if name == BASE:
        return {}
    variant, _, regime = name.partition("@")
    regime, _, kept = regime.partition("-kept")
    swept = {"kept": list(SWEEP)} if regime.endswith(SWEPT) else {"kept": float(kept)} if kept else {}
    regime = regime.removesuffix(SWEPT)
    variant, dot, control = variant.rpartition(".") if variant.endswith((".rows", ".each")) else (variant, "", "")
    return {**REGIMES[regime], **POINTS[variant], **CONTROLS[dot + control], **swept}


def first_points(regimes: Sequence[str] = tuple(REGIMES)) -> list[str]:
    """What the regime is chosen by: the term and the run without it, in each."""
    return [BASE, *(f"{name}@{regime}" for regime in regimes for name in (MAIN, ALIGNED))]


def second_points(regime: str) -> list[str]:
    """All variants in one regime, each with the stronger control, and what else belongs to the map."""
    pairs = [f"{name}{control}@{regime}" for name in VARIANTS for control in ("", ".rows")]
    languages = [f"{name}@{regime}" for name in LANGUAGES]
    others = [f"{name}@{regime}" for name in ("guards", *LONGER, f"{MAIN}.each", "repulsion.each")]
    guarded = [f"{name}@{regime}" for name in GUARDED]
    return [*pairs[:2], *guarded, *pairs[2:14], *languages, *pairs[14:16], *others, *pairs[16:]]


def methods(ours: str) -> dict[str, dict]:
    """The table, ours being a point of the map: the run without the term, and the controls, in the same regime."""
    settings, regime = point(ours), point(f"{ALIGNED}@{ours.partition('@')[2]}")
    steps = {"steps": settings["steps"]} if "steps" in settings else {}
    shared = {name: settings[name] for name in ("taught", "mlc_languages_per_step") if name in settings}
    return {
        BASE: {name: regime[name] for name in ("concepts",) if name in regime},
        ALIGNED: {**regime, **steps},
        OURS: settings,
        SHUFFLED[0]: {**settings, "shuffled": "each"},
        SHUFFLED[1]: {**settings, "shuffled": "rows"},
        "guards": {**settings, "mlc_objective": "none", "mlc_contrast": 0.0, "mlc_repulsion": 1.0},
        "cosine": {**settings, "mlc_objective": "cosine", "mlc_contrast": 0.0, "mlc_repulsion": 0.0},
        "plain": {**regime, **steps, **VARIANTS["plain"], **shared},
    }
