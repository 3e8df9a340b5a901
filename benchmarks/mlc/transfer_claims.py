"""The claims of `transfer.py`, derived from its rows and nothing else."""

from __future__ import annotations

import statistics

from benchmarks._results import claim


OURS = "center+repulsion"
SHUFFLED = f"{OURS}.shuffled"


def values(rows: list[dict], method: str, metric: str) -> list[float]:
    """One number per seed, in order of seeds; rows per language are left out."""
    found = [r for r in rows if r["method"] == method and r["metric"] == metric and "language" not in r]
    return [r["value"] for r in sorted(found, key=lambda r: r["seed"])]


def claims(rows: list[dict]) -> list[dict]:
    """The issue's claims for our method against the run with the aligned loss only, and against shuffled translations."""
    present = {row["method"] for row in rows}
    if not {"aligned", OURS} <= present:
        return []

    def mean(method: str, metric: str) -> float:
        return statistics.fmean(values(rows, method, metric))

    found = []
    for group, target in (("seen", 5), ("held_out", 2)):
        metric = f"variance_x100_{group}"
        cut = mean("aligned", metric) / max(mean(OURS, metric), 1e-9)
        how = f"mean over seeds of {metric}: aligned / {OURS}"
        found.append(claim(f"mlc.transfer.variance_cut_{group}", cut, ">=", target, how))
    drop = mean("aligned", "accuracy_english") - mean(OURS, "accuracy_english")
    found.append(claim("mlc.transfer.english_accuracy_drop", drop, "<=", 0.01, f"aligned - {OURS}, means over seeds"))
    ratio = mean(OURS, "perplexity_english") / mean("aligned", "perplexity_english")
    how = f"{OURS} / aligned, means over seeds, Debian Handbook"
    found.append(claim("mlc.transfer.english_perplexity_ratio", ratio, "<=", 1.02, how))
    ours, shuffled = values(rows, OURS, "accuracy_transfer"), values(rows, SHUFFLED, "accuracy_transfer")
    if min(len(ours), len(shuffled)) > 1:
        spread = ((statistics.variance(ours) + statistics.variance(shuffled)) / 2) ** 0.5
        gain = (statistics.fmean(ours) - statistics.fmean(shuffled)) / max(spread, 1e-9)
        how = f"accuracy_transfer: ({OURS} - {SHUFFLED}) / pooled standard deviation over seeds"
        found.append(claim("mlc.transfer.gain_over_shuffled_in_sd", gain, ">=", 2, how))
    return found
