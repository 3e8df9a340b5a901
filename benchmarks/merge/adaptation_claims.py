"""The claims of `adaptation.py`, derived from its rows and nothing else."""

from __future__ import annotations

import statistics

from tools.result_files import claim


#: Everything that a donor's knowledge has no part in, with all that comes from a random donor.
CONTROLS = ("none", "shrink", "own texts", "own teacher", "own texts and own teacher", "shuffled teacher")
#: Metrics of single runs: loss on validation and on held-out text.
MEASURED = ("valid", "nll")
#: What an arm may choose.
SETTING = ("rate", "steps", "batch", "share")


def is_control(arm: str) -> bool:
    """Whether an arm is without the donor's knowledge."""
    return arm in CONTROLS or arm.endswith("random donor")


def common_seeds(found: dict[tuple, dict[int, dict[str, float]]]) -> set[int]:
    """Seeds that have both a control and an arm with a donor, of what is found by arm and setting."""
    sides = {True: set(), False: set()}
    for (arm, *_), values in found.items():
        sides[is_control(arm)] |= set(values)
    return set.intersection(*sides.values())


def table(rows: list[dict], task: str, metric: str, texts: int | None = None) -> dict[str, float]:
    """Mean over seeds of every arm's loss after adaptation, at its setting with the best mean on validation text.

    Of one task and number of given texts, over the seeds that have both controls and donor arms. A setting that some such
    seed lacks (its process was cut off) is left out: means over unlike seeds don't compare.
    """
    found: dict[tuple, dict[int, dict[str, float]]] = {}
    for row in rows:
        here = (row.get("task"), row.get("texts")) == (task, texts)
        if here and row.get("when") == "after" and row["metric"] in MEASURED:
            place = row["arm"], *(row.get(name) for name in SETTING)
            found.setdefault(place, {}).setdefault(row["seed"], {})[row["metric"]] = row["value"]
    seeds = common_seeds(found)
    best: dict[str, dict[str, float]] = {}
    for (arm, *_), values in sorted(found.items(), key=lambda item: str(item[0])):
        if seeds and seeds <= set(values):
            mean = {name: statistics.fmean(values[seed][name] for seed in seeds) for name in MEASURED}
            if arm not in best or mean["valid"] < best[arm]["valid"]:
                best[arm] = mean
    return {arm: values[metric] for arm, values in best.items()}


def budgets(rows: list[dict]) -> dict[str, list[int | None]]:
    """Numbers of given texts of every task that has rows of arms, the largest last."""
    found: dict[str, set] = {}
    for row in rows:
        if "task" in row and "arm" in row and "seed" in row:
            found.setdefault(row["task"], set()).add(row.get("texts"))
    return {task: sorted(texts, key=lambda n: n or 0) for task, texts in sorted(found.items())}


def seeds_of(rows: list[dict], task: str, texts: int | None) -> set[int]:
    """Seeds over which the table of a task and number of texts is the mean."""
    found: dict[tuple, dict[int, dict[str, float]]] = {}
    for row in rows:
        if "seed" in row and (row.get("task"), row.get("texts"), row.get("when")) == (task, texts, "after"):
            found.setdefault((row["arm"],), {})[row["seed"]] = {}
    return common_seeds(found)


def summary(rows: list[dict]) -> list[dict]:
    """Rows for the table in the docs: mean held-out loss over seeds of every arm, before adaptation and after it."""
    found = []
    for task, numbers in budgets(rows).items():
        for texts in numbers:
            before: dict[str, dict[int, float]] = {}  # settings of an arm start alike
            for row in rows:
                place = row.get("task"), row.get("texts"), row.get("when"), row["metric"]
                if place == (task, texts, "before", "nll"):
                    before.setdefault(row["arm"], {})[row["seed"]] = row["value"]
            for arm, after in table(rows, task, "nll", texts).items():
                values = {
                    "before": statistics.fmean(before[arm][seed] for seed in seeds_of(rows, task, texts)),
                    "after": after,
                }
                place = {"task": task, "texts": texts, "arm": arm, "metric": "mean nll"}
                found += [place | {"when": when, "value": value} for when, value in values.items()]
            gain = gain_of(rows, task, texts)
            found += [{"task": task, "texts": texts, "metric": "gain", "value": gain[0]}] if gain else []
    return found


def gain_of(rows: list[dict], task: str, texts: int | None) -> tuple[float, str, str] | None:
    """What the donor's best arm, by validation, wins over the best control, by held-out loss; both arms."""
    valid, nll = table(rows, task, "valid", texts), table(rows, task, "nll", texts)
    controls, donors = [arm for arm in nll if is_control(arm)], [arm for arm in nll if not is_control(arm)]
    if not controls or not donors:
        return None
    control, donor = min(controls, key=nll.get), min(donors, key=valid.get)
    return nll[control] - nll[donor], donor, control


def claimed(rows: list[dict], tasks: list[str]) -> list[str]:
    """Of every donor the task on which it leads most before any adaptation; tasks without a measured lead count too."""
    leads = {row["task"]: (row["donor"], row["value"]) for row in rows if row["metric"] == "lead"}
    best = {}
    for task in tasks:
        donor, lead = leads.get(task, (task, 0.0))
        if donor not in best or lead > best[donor][0]:
            best[donor] = lead, task
    return sorted(task for _, task in best.values())


def claims(rows: list[dict]) -> list[dict]:
    """The gain where text is scarcest, there with all controls; the smallest over donors, each where it leads most."""
    gains = {task: gain_of(rows, task, numbers[0]) for task, numbers in budgets(rows).items()}
    gains = {task: gain for task, gain in gains.items() if gain}
    if not gains:
        return []
    chosen = claimed(rows, sorted(gains))
    places = [(task, budgets(rows)[task][0]) for task in chosen]
    seeds = min(len(seeds_of(rows, *place)) for place in places)
    told = {task: f"{task}: {gain:.3f}, '{arm}' against '{control}'" for task, (gain, arm, control) in gains.items()}
    parts = "; ".join(told[task] for task in chosen)
    others = "; ".join(told[task] for task in sorted(gains) if task not in chosen)
    how = f"smallest over tasks of best control minus donor arm, mean held-out nats per token over {seeds} seed(s) ({parts}"
    how += f"; not claimed, where the donor leads less: {others})" if others else ")"
    smallest = min(gains[task][0] for task in chosen)
    return [claim("merge.unrelated.donor_specific_gain_nats", smallest, ">=", 0.05, how)]
