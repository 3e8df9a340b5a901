"""The claims of `adaptation.py`, derived from its rows and nothing else."""

from __future__ import annotations

import statistics

from benchmarks._results import claim


CONTROLS = ("none", "shrink")
#: Metrics of single runs: loss on validation and on held-out text.
MEASURED = ("valid", "nll")


def table(rows: list[dict], task: str, metric: str) -> dict[str, float]:
    """Mean over seeds of every arm's loss after adaptation; of several settings of an arm the best on validation text.

    A setting that some seed lacks (its process was cut off) is left out: means over unlike seeds don't compare.
    """
    settings: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        if row.get("task") == task and row["when"] == "after" and row["metric"] in MEASURED:
            place = settings.setdefault((row["arm"], row.get("share"), row["seed"], row["rate"]), {})
            place[row["metric"]] = row["value"]
    by_seed: dict[tuple, dict] = {}
    for (arm, share, seed, _), values in settings.items():  # the rate is chosen per seed, the share over all seeds
        kept = by_seed.get((arm, share, seed))
        if kept is None or values["valid"] < kept["valid"]:
            by_seed[arm, share, seed] = values
    means: dict[tuple, dict[str, float]] = {}
    seeds = len({seed for _, _, seed in by_seed})
    for arm, share in {(arm, share) for arm, share, _ in by_seed}:
        found = [values for (a, s, _), values in by_seed.items() if (a, s) == (arm, share)]
        if len(found) == seeds:
            means[arm, share] = {name: statistics.fmean(values[name] for values in found) for name in MEASURED}
    best: dict[str, dict[str, float]] = {}
    for (arm, _), values in sorted(means.items(), key=lambda item: str(item[0])):
        if arm not in best or values["valid"] < best[arm]["valid"]:
            best[arm] = values
    return {arm: values[metric] for arm, values in best.items()}


def summary(rows: list[dict]) -> list[dict]:
    """Rows for the table in the docs: mean held-out loss over seeds of every arm, before adaptation and after it."""
    found = []
    for task in sorted({row["task"] for row in rows if "task" in row}):
        before: dict[str, dict[int, float]] = {}  # settings of an arm start alike
        for row in rows:
            if (row.get("task"), row.get("when"), row["metric"]) == (task, "before", "nll"):
                before.setdefault(row["arm"], {})[row["seed"]] = row["value"]
        for arm, after in table(rows, task, "nll").items():
            values = {"before": statistics.fmean(before[arm].values()), "after": after}
            found += [
                {"task": task, "arm": arm, "when": when, "metric": "mean nll", "value": value}
                for when, value in values.items()
            ]
    return found


def claims(rows: list[dict]) -> list[dict]:
    """What the donor's best arm, by validation, wins over the best control, by held-out loss; the smallest over tasks."""
    gains = {}
    for task in sorted({row["task"] for row in rows if "task" in row}):
        valid, nll = table(rows, task, "valid"), table(rows, task, "nll")
        controls = [arm for arm in nll if arm in CONTROLS or arm.endswith("random donor")]
        donors = [arm for arm in nll if arm not in controls]
        if controls and donors:
            control, donor = min(controls, key=nll.get), min(donors, key=valid.get)
            gains[task] = (nll[control] - nll[donor], donor, control)
    if not gains:
        return []
    seeds = len({row["seed"] for row in rows if "seed" in row})
    parts = "; ".join(
        f"{task}: {gain:.3f}, '{arm}' against '{control}'" for task, (gain, arm, control) in gains.items()
    )
    how = f"smallest over tasks of best control minus donor arm, mean held-out nats per token over {seeds} seed(s) ({parts})"
    return [
        claim("merge.unrelated.donor_specific_gain_nats", min(gain for gain, _, _ in gains.values()), ">=", 0.05, how)
    ]
