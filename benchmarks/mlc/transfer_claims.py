"""The claims of `transfer.py`, derived from its rows and nothing else."""

from __future__ import annotations

import statistics

from benchmarks._results import claim
from benchmarks.mlc.transfer_methods import ALIGNED, BASE, OURS, SHUFFLED


VARIANCE_CUTS = {"seen": 5, "held_out": 2}
MOST_DROP, MOST_PERPLEXITY = 0.01, 1.02


def values(rows: list[dict], method: str, metric: str) -> list[float]:
    """One number per seed, in order of seeds; rows per language are left out."""
    found = [r for r in rows if r["method"] == method and r["metric"] == metric and "language" not in r]
    return [r["value"] for r in sorted(found, key=lambda r: r["seed"])]


def claims(rows: list[dict]) -> list[dict]:
    """The issue's claims for our method against the run with the aligned loss only, and against shuffled translations."""
    present = {row["method"] for row in rows}
    if not {ALIGNED, OURS} <= present:
        return []

    def mean(method: str, metric: str) -> float:
        return statistics.fmean(values(rows, method, metric))

    found = []
    for group, target in VARIANCE_CUTS.items():
        metric = f"variance_x100_{group}"
        cut = mean(ALIGNED, metric) / max(mean(OURS, metric), 1e-9)
        how = f"mean over seeds of {metric}: aligned / {OURS}"
        found.append(claim(f"mlc.transfer.variance_cut_{group}", cut, ">=", target, how))
    drop = mean(ALIGNED, "accuracy_english") - mean(OURS, "accuracy_english")
    found.append(
        claim("mlc.transfer.english_accuracy_drop", drop, "<=", MOST_DROP, f"aligned - {OURS}, means over seeds")
    )
    # medians: one diverged seed would decide a mean of perplexities, and a diverged aligned run would make ours look good
    ours, aligned = (statistics.median(values(rows, name, "perplexity_english")) for name in (OURS, ALIGNED))
    ratio = ours / aligned
    how = f"{OURS} / aligned, medians over seeds, Debian Handbook"
    found.append(claim("mlc.transfer.english_perplexity_ratio", ratio, "<=", MOST_PERPLEXITY, how))
    ours, shuffled = values(rows, OURS, "accuracy_transfer"), values(rows, SHUFFLED, "accuracy_transfer")
    if min(len(ours), len(shuffled)) > 1:
        spread = ((statistics.variance(ours) + statistics.variance(shuffled)) / 2) ** 0.5
        gain = (statistics.fmean(ours) - statistics.fmean(shuffled)) / max(spread, 1e-9)
        how = f"accuracy_transfer: ({OURS} - {SHUFFLED}) / pooled standard deviation over seeds"
        found.append(claim("mlc.transfer.gain_over_shuffled_in_sd", gain, ">=", 2, how))
    return found


def choose(rows: list[dict], names: list[str]) -> str:
    """The candidate of a map that comes nearest to holding all claims at once, against the run without the term at its rate.

    The score is the worst of: the two variance cuts, perplexity and English accuracy, each over its target; what lies
    beyond the target in the last two counts tenfold, since they change less.

    Raises:
        ValueError: when the map holds no candidate and its run without the term.
    """
    scores = {}
    for name in names:
        rate = name.partition(",rate=")[2]
        without = f"{ALIGNED},rate={rate}" if rate else ALIGNED
        if name.startswith((ALIGNED, BASE)) or not (
            values(rows, name, "perplexity_english") and values(rows, without, "loss last")
        ):
            continue

        def of(method: str, metric: str) -> float:
            return statistics.fmean(values(rows, method, metric))

        cuts = [
            of(without, f"variance_x100_{group}") / max(of(name, f"variance_x100_{group}"), 1e-3) / target
            for group, target in VARIANCE_CUTS.items()
        ]
        drop = of(without, "accuracy_english") - of(name, "accuracy_english") - MOST_DROP
        more = of(name, "perplexity_english") / of(without, "perplexity_english") - MOST_PERPLEXITY
        scores[name] = min(*(min(cut, 3.0) for cut in cuts), 3.0) - 10 * (max(drop, 0) + max(more, 0))
    if not scores:
        raise ValueError(f"The map has no candidate among {names} with its run without the term.")
    return max(scores, key=scores.__getitem__)
