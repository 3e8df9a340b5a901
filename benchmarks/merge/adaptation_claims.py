"""The claims of `adaptation.py`, derived from its rows and nothing else."""

from __future__ import annotations

import statistics

from benchmarks._results import claim


CONTROLS = ("none", "shrink", "merge, random donor", "teacher, random donor")


def claims(rows: list[dict]) -> list[dict]:
    """What the best donor arm wins over the best control; nothing when either side was not run."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        if row["metric"] == "nll" and row["when"] == "after":
            losses.setdefault(row["arm"], []).append(row["value"])
    means = {arm: statistics.fmean(values) for arm, values in losses.items()}
    controls = {arm: value for arm, value in means.items() if arm in CONTROLS}
    donors = {arm: value for arm, value in means.items() if arm not in CONTROLS}
    if not controls or not donors:
        return []
    control, donor = min(controls, key=controls.get), min(donors, key=donors.get)
    how = (
        f"best control ({control}) minus best donor arm ({donor}), mean held-out nats per token after adaptation over "
        f"{len(losses[donor])} seed(s)"
    )
    gain = controls[control] - donors[donor]
    return [claim("merge.unrelated.donor_specific_gain_nats", gain, ">=", 0.05, how)]
