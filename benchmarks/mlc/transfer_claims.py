"""The claims of `transfer.py`, and how its map is read, derived from rows and nothing else."""

from __future__ import annotations

import statistics

from benchmarks.mlc.transfer_methods import ALIGNED, BASE, MAIN, OURS, REGIMES, SHUFFLED, VARIANTS
from tools.result_files import claim


VARIANCE_CUTS = {"seen": 5, "held_out": 2}
MOST_DROP, MOST_PERPLEXITY, LEAST_GAIN = 0.01, 1.02, 2
LEAST_ENGLISH, MOST_DRIFT = 0.95, 1.1  # of the run without the term: it must have learned, and kept its English
WANTED_GAIN = 0.04  # over shuffled translations, in the map, where one seed has no spread


def values(rows: list[dict], method: str, metric: str) -> list[float]:
    """One number per seed, in order of seeds; rows per language are left out."""
    found = [r for r in rows if r["method"] == method and r["metric"] == metric and "language" not in r]
    return [r["value"] for r in sorted(found, key=lambda r: r["seed"])]


def seeds_of(rows: list[dict], *methods: str) -> set[int]:
    """Seeds that all the methods were run on: a stop leaves some with more than others."""
    return set.intersection(*({row["seed"] for row in rows if row["method"] == method} for method in methods))


def claims(rows: list[dict]) -> list[dict]:
    """The issue's claims for our method against the run with the aligned loss only, and against shuffled translations.

    Each compares what was run on the same seeds.
    """
    seeds = seeds_of(rows, ALIGNED, OURS)
    if not seeds:
        return []
    paired = [row for row in rows if row["seed"] in seeds]

    def mean(method: str, metric: str) -> float:
        return statistics.fmean(values(paired, method, metric))

    found = []
    over = f"over {len(seeds)} seeds"
    for group, target in VARIANCE_CUTS.items():
        metric = f"variance_x100_{group}"
        cut = mean(ALIGNED, metric) / max(mean(OURS, metric), 1e-9)
        how = f"mean {over} of {metric}: aligned / {OURS}"
        found.append(claim(f"mlc.transfer.variance_cut_{group}", cut, ">=", target, how))
    drop = mean(ALIGNED, "accuracy_english") - mean(OURS, "accuracy_english")
    found.append(claim("mlc.transfer.english_accuracy_drop", drop, "<=", MOST_DROP, f"aligned - {OURS}, means {over}"))
    # medians: one diverged seed would decide a mean of perplexities, and a diverged aligned run would make ours look good
    ours, aligned = (statistics.median(values(paired, name, "perplexity_english")) for name in (OURS, ALIGNED))
    ratio = ours / aligned
    how = f"{OURS} / aligned, medians {over}, Debian Handbook"
    found.append(claim("mlc.transfer.english_perplexity_ratio", ratio, "<=", MOST_PERPLEXITY, how))
    gains = [gain_in_sd(rows, control) for control in SHUFFLED]
    if None not in gains:
        how = f"accuracy_transfer: ({OURS} - control) / pooled standard deviation over seeds, the lesser of both controls"
        found.append(claim("mlc.transfer.gain_over_shuffled_in_sd", min(gains), ">=", LEAST_GAIN, how))
    return found


def gain_in_sd(rows: list[dict], control: str) -> float | None:
    """How far our transfer lies above a control's, in pooled standard deviations; `None` for fewer than two seeds."""
    seeds = seeds_of(rows, OURS, control)
    paired = [row for row in rows if row["seed"] in seeds]
    ours, other = values(paired, OURS, "accuracy_transfer"), values(paired, control, "accuracy_transfer")
    if len(seeds) < 2:
        return None
    spread = ((statistics.variance(ours) + statistics.variance(other)) / 2) ** 0.5
    return (statistics.fmean(ours) - statistics.fmean(other)) / max(spread, 1e-9)


def score(rows: list[dict], name: str) -> float | None:
    """How near a point of the map comes to holding all claims at once, on validation languages.

    The worst of the two variance cuts and, where its `.rows` control was run, the gain in accuracy over it, each over its
    target and at most 3; less ten times what exceeds the targets for English accuracy and perplexity, both against the run
    without the term, and ten times what that run itself lacks in English accuracy or has lost in perplexity against the
    untrained model. `None` where a needed run is missing.
    """
    variant, _, regime = name.partition("@")
    without = f"{ALIGNED},steps=200@{regime}" if variant.endswith("steps=200") else f"{ALIGNED}@{regime}"

    scored = [row for row in rows if row["metric"] == "perplexity_english"]  # a sweep has rows of the training, too
    seeds = seeds_of(scored, name, without, BASE)
    if not seeds:
        return None
    rows = [row for row in rows if row["seed"] in seeds]

    def of(method: str, metric: str) -> float:
        return statistics.fmean(values(rows, method, metric))

    parts = [
        of(without, f"variance_x100_{group}") / max(of(name, f"variance_x100_{group}"), 1e-3) / target
        for group, target in (("seen", VARIANCE_CUTS["seen"]), ("validation", VARIANCE_CUTS["held_out"]))
    ]
    control = f"{variant}.rows@{regime}"
    if values(rows, control, "accuracy_transfer"):
        parts.append((of(name, "accuracy_transfer") - of(control, "accuracy_transfer")) / WANTED_GAIN)
    beyond = [
        of(without, "accuracy_english") - of(name, "accuracy_english") - MOST_DROP,
        of(name, "perplexity_english") / of(without, "perplexity_english") - MOST_PERPLEXITY,
        LEAST_ENGLISH - of(without, "accuracy_english"),
        of(without, "perplexity_english") / of(BASE, "perplexity_english") - MOST_DRIFT,
    ]
    return min(*parts, 3.0) - 10 * sum(max(more, 0.0) for more in beyond)


def choose_regime(rows: list[dict]) -> str:
    """The regime whose main variant scores best; the first one if none was run."""
    scores = {regime: score(rows, f"{MAIN}@{regime}") for regime in REGIMES}
    return max(REGIMES, key=lambda regime: -1e9 if scores[regime] is None else scores[regime])


def choose(rows: list[dict]) -> str:
    """The point of a map that scores best, among variants whose `.rows` control was run too.

    Raises:
        ValueError: when there is none.
    """
    names = {row["method"] for row in rows}
    scores = {}
    for name in sorted(names):
        variant, _, regime = name.partition("@")
        if variant in VARIANTS and f"{variant}.rows@{regime}" in names:
            found = score(rows, name)
            if found is not None:
                scores[name] = found
    if not scores:
        raise ValueError("The map has no variant with its shuffled control and its run without the term.")
    return max(scores, key=scores.__getitem__)
