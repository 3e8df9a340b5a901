"""The claims about accuracy, from the rows alone.

The excess of a method is its negative log-likelihood minus full precision's on the same windows, averaged over the
texts, then over the seeds. A claim whose rows were not measured is not made; `expected` names all there should be.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from tools.result_files import claim


FP = ("fp", "w16a16")
SETTING = "w4a4"
CPU_COST = "cpu_cost"  # group of the rows of `run.py --cpu-cost`
PER_ROW = ("quarot", "quarot-search", "quarot-asym", "quarot-asym-search")
PUBLISHED = ("quarot-published", "quarot-published-asym")
REQUIRED = ("quarot", "quarot-asym", "quarot-asym-search", "flatquant")
QUALITY = (
    # suffix of the id, ours, theirs (the best of them counts), target
    ("excess_over_quarot", "freeact", (*PER_ROW, *PUBLISHED), 0.30),
    ("excess_over_flatquant", "freeact", ("flatquant",), 0.75),
    ("learned_excess_over_flatquant", "freeact-learned", ("flatquant",), 0.60),
    # for the reader of the first: against QuaRot as its authors run it, against ours on grids as fine as the default's, and
    # what the default loses on one grid a row
    ("excess_over_quarot_published", "freeact", PUBLISHED, 0.30),
    ("excess_over_quarot_groups", "freeact", ("quarot-groups", "quarot-groups-asym"), 0.75),
    ("fast_excess_over_quarot", "freeact-fast", (*PER_ROW, *PUBLISHED), 0.30),
)
SIZE = 0.30
COST = (
    # suffix of the id, metric of the rows, target
    ("calibration_seconds", "calibration_seconds", 180.0),
    ("calibration_peak_gb", "peak_gb", 3.0),
)
COST_MODEL = "smollm2"


def claims(rows: list[dict]) -> list[dict]:
    """Every claim that the rows allow, in a fixed order."""
    models = dict.fromkeys(row["model"] for row in rows)
    found = []
    for model in models:
        for name, ours, theirs, target in QUALITY:
            found.append(_ratio(rows, model, name, ours, theirs, target))
        found.append(_size(rows, model))
    found += [_cost(rows, *entry) for entry in COST]
    return [entry for entry in found if entry is not None]


def expected(models: Iterable[str]) -> list[str]:
    """Ids that a whole run on these models claims (the CPU's cost is a run of its own)."""
    return [f"accuracy.{model}.{SETTING}.{name}" for model in models for name, *_ in QUALITY] + [
        f"accuracy.{model}.size_ratio" for model in models
    ]


def excess(rows: list[dict], model: str, method: str, setting: str, text: str | None = None) -> dict[int, float]:
    """Excess negative log-likelihood by seed: of one text, or the mean over all texts of full precision.

    A seed that lacks a text is left out.
    """
    base = {row["text"]: row["value"] for row in _nll(rows, model, *FP)}
    texts = list(base) if text is None else [text]
    by_seed: dict[int, dict[str, float]] = {}
    for row in _nll(rows, model, method, setting):
        by_seed.setdefault(row["seed"], {})[row["text"]] = row["value"]
    return {
        seed: statistics.fmean(values[t] - base[t] for t in texts)
        for seed, values in sorted(by_seed.items())
        if texts and all(t in values and t in base for t in texts)
    }


def _nll(rows: list[dict], model: str, method: str, setting: str) -> list[dict]:
    wanted = {"model": model, "method": method, "setting": setting, "metric": "nll"}
    return [row for row in rows if row["value"] is not None and all(row.get(k) == v for k, v in wanted.items())]


def _ratio(rows, model: str, name: str, ours: str, theirs: tuple[str, ...], target: float) -> dict | None:
    """A ratio of means over the seeds that both sides have, against the best rival."""
    mine = excess(rows, model, ours, SETTING)
    # one that failed is a row without a value, and no claim is made; files from before a rival was tried do not name it
    named = {row["method"] for row in rows if row["model"] == model}
    theirs = tuple(method for method in theirs if method in named or method in REQUIRED)
    rivals = {
        method: {seed: value for seed, value in excess(rows, model, method, SETTING).items() if seed in mine}
        for method in theirs
    }
    if not mine or not rivals or not all(rivals.values()):
        return None
    best = min(rivals, key=lambda method: statistics.fmean(rivals[method].values()))
    rival = rivals[best]
    mine = {seed: mine[seed] for seed in rival}
    theirs_mean = statistics.fmean(rival.values())
    if theirs_mean <= 0:
        return None
    how = (
        f"(nll[{ours}] - nll[fp]) / (nll[{best}] - nll[fp]) at {SETTING}, mean over texts and seeds "
        f"{', '.join(map(str, mine))}: {_spread(mine)} / {_spread(rival)} nats"
    )
    if len(mine) > 1 and min(rival.values()) > 0:
        single = [mine[seed] / rival[seed] for seed in mine]
        how += f"; single seeds give {min(single):.3g} to {max(single):.3g}"
    if len(theirs) > 1:
        how += f"; {best} is the best of {', '.join(theirs)}"
    value = statistics.fmean(mine.values()) / theirs_mean
    return claim(f"accuracy.{model}.{SETTING}.{name}", value, "<=", target, how)


def _spread(by_seed: dict[int, float]) -> str:
    values = list(by_seed.values())
    text = f"{statistics.fmean(values):.4g}"
    return f"{text} ± {statistics.stdev(values):.2g} (standard deviation)" if len(values) > 1 else text


def _values(rows: list[dict], **wanted: str) -> list[float]:
    return [
        row["value"] for row in rows if row["value"] is not None and all(row.get(k) == v for k, v in wanted.items())
    ]


def _size(rows: list[dict], model: str) -> dict | None:
    values = _values(rows, model=model, group="preset", method="freeact", setting=SETTING, metric="size_ratio")
    if not values:
        return None
    how = (
        f"bytes of all tensors of the quantized linears and their inputs / 2 bytes a weight of the linears they "
        f"replace, freeact at {SETTING}; the largest over seeds"
    )
    return claim(f"accuracy.{model}.size_ratio", max(values), "<=", SIZE, how)


def _cost(rows: list[dict], name: str, metric: str, target: float) -> dict | None:
    values = _values(rows, model=COST_MODEL, group=CPU_COST, metric=metric)
    if not values:
        return None
    how = {
        "calibration_seconds": "wall seconds of from_pretrained(quantization_config=FreeActConfig(...)), reading the "
        "model included, 2 CPU threads, fresh process; the slowest run",
        "calibration_peak_gb": "largest resident memory of that whole process, 1e9 bytes; the largest run",
    }[name]
    return claim(f"accuracy.{COST_MODEL}.{name}", max(values), "<=", target, how)
