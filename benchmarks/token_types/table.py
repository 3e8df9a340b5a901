"""From what jobs told to rows, and the table that is printed."""

from __future__ import annotations

import math

from benchmarks.token_types.claims import LOSS, claims, losses, won_back
from benchmarks.token_types.jobs import Job
from benchmarks.token_types.methods import FP
from benchmarks.token_types.runner import Runner


def assemble(jobs: list[Job], runner: Runner) -> list[dict]:
    """Rows of all jobs; one without a value and with the reason for each that gave none."""
    rows: list[dict] = []
    for job in jobs:
        if job.key in runner.told:
            rows += [finite(row) for row in runner.told[job.key]]
            continue
        for setting in job.settings:
            mode = {"mode": "cached" if "kv" in setting else "whole"}
            head = {"model": job.model, "group": job.group, "method": job.method, "setting": setting, **mode}
            note = runner.failures.get(job.key, "not run")
            metric = LOSS.get(job.model, "three_types_time_ratio")
            rows.append({**head, "metric": metric, "value": None, "seed": job.seed, "note": note})
    return rows + excesses(rows)


def finite(row: dict) -> dict:
    """The row, without its value where that is no number."""
    if row["value"] is None or math.isfinite(row["value"]):
        return row
    return {**row, "value": None, "note": f"the value is {row['value']}"}


def excesses(rows: list[dict]) -> list[dict]:
    """Loss over full precision, by model, method, setting and seed; and the share of FlatQuant's won back."""
    found = []
    heads = dict.fromkeys(
        (r["model"], r["group"], r["method"], r["setting"]) for r in rows if r["metric"] in LOSS.values()
    )
    for model, group, method, setting in heads:
        if group in ("full", "train"):
            continue
        base = losses(rows, model, FP[0], setting)
        head = {"model": model, "group": group, "method": method, "setting": setting}
        for seed, value in losses(rows, model, method, setting).items() if base else ():
            found.append({**head, "metric": "excess_loss", "value": value - next(iter(base.values())), "seed": seed})
        share = won_back(rows, model, method, setting)
        if share is not None:
            found.append({**head, "metric": "gap_won_back", "value": share, "seed": 0})
    return found


def report(rows: list[dict], failures: dict[str, str]) -> None:
    """Losses, then claims: the last things printed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110, highlight=False)
    for model in dict.fromkeys(row["model"] for row in rows if row["model"] in LOSS):
        table = Table(title=f"{model}: {LOSS[model]}", box=None, padding=(0, 1), title_justify="left")
        for column in ("method", "setting", "loss", "excess", "won back", "seeds", "size", "s"):
            table.add_column(column, no_wrap=True)
        heads = dict.fromkeys(
            (r["method"], r["setting"]) for r in rows if r["model"] == model and r["method"] != "train"
        )
        for method, setting in heads:
            shown = ("w4a4", "w4a4kv4") if method == FP[0] else (setting,)
            for one in shown:
                values = list(losses(rows, model, method, one).values())
                loss = sum(values) / len(values) if values else None
                base = losses(rows, model, FP[0], one)
                excess = None if loss is None or not base else loss - next(iter(base.values()))
                cells = [loss, excess, won_back(rows, model, method, one)]
                told = [f"{cell:.4f}" if cell is not None else "-" for cell in cells]
                more = [_metric(rows, model, method, name) for name in ("size_ratio", "calibration_seconds")]
                table.add_row(method, one, *told, str(len(values)), *more)
        console.print(table)
    for reason in dict.fromkeys(failures.values()):
        console.print(f"not measured: {reason}"[:200], style="yellow", markup=False)
    for entry in claims(rows):
        verdict = "pass       " if entry["holds"] else "falls short"
        line = f"{verdict} {entry['id']} {entry['value']:.4g} {entry['compare']} {entry['target']:g}"
        console.print(line, style="green" if entry["holds"] else "red", markup=False)


def _metric(rows: list[dict], model: str, method: str, metric: str) -> str:
    wanted = {"model": model, "method": method, "metric": metric}
    values = [r["value"] for r in rows if r["value"] is not None and all(r.get(k) == v for k, v in wanted.items())]
    return f"{sum(values) / len(values):.3g}" if values else ""
