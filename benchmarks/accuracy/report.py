"""From finished jobs to the result file and the printed table."""

from __future__ import annotations

from pathlib import Path

from benchmarks.accuracy.claims import claims, excess
from benchmarks.accuracy.jobs import Job, absent
from benchmarks.accuracy.runner import Store
from tools import result_files


COLUMNS = ("handbook", "brown")


def assemble(jobs: list[Job], store: Store, failures: dict[str, str]) -> list[dict]:
    """Rows of all planned jobs, measured or not, and the excesses that follow from them."""
    rows: list[dict] = []
    for job in jobs:
        told = store.lines.get(job.key)
        rows += told["rows"] if told else absent(job, failures.get(job.key, "not run"))
    return rows + derived(rows)


def derived(rows: list[dict]) -> list[dict]:
    """Excess over full precision of each quantized model, and what 4-bit activations add to the same at W4A16."""
    found = []
    kept = ("model", "group", "method", "setting")
    heads = dict.fromkeys(tuple(row[key] for key in kept) for row in rows if row["metric"] == "nll")
    for head in heads:
        model, group, method, setting = head
        if group == "full":
            continue
        base = excess(rows, model, method, "w4a16")
        for seed, value in excess(rows, model, method, setting).items():
            fields = dict(zip(kept, head, strict=True))
            found.append({**fields, "metric": "excess_nll", "value": value, "seed": seed})
            if setting == "w4a4" and seed in base:
                gap = {"metric": "excess_nll_over_w4a16", "value": value - base[seed], "seed": seed}
                found.append({**fields, **gap})
    return found


def write(name: str, rows: list[dict], store: Store, jobs: list[Job], seeds: list[int], out: Path) -> Path:
    """The result file, stamped with every command and machine that its rows come from."""
    used = [store.lines[job.key] for job in jobs if job.key in store.lines]
    commands = "; ".join(dict.fromkeys(line["command"] for line in used))
    machines = " and ".join(dict.fromkeys(line["machine"] for line in used))
    module = "benchmarks.accuracy.no_claims" if name.endswith("variants") else "benchmarks.accuracy.claims"
    return result_files.write(name, rows, module, commands, seeds, machine=machines, folder=out)


def report(rows: list[dict], problems: list[str], wanted: list[str]) -> None:
    """The table of all methods, then the claims: the last things printed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100, highlight=False, soft_wrap=False)
    methods = dict.fromkeys((row["model"], row["method"], row["setting"]) for row in rows)
    for model in dict.fromkeys(row["model"] for row in rows):
        base = {r["text"]: r["value"] for r in rows if r["model"] == model and r["method"] == "fp" and "text" in r}
        stated = ", ".join(f"{text} {value:.4f}" for text, value in base.items() if value is not None)
        table = Table(
            title=f"{model}: full precision {stated}; excess nats", box=None, padding=(0, 1), title_justify="left"
        )
        for column in ("method", "setting", *COLUMNS, "mean", "size", "s", "GB"):
            table.add_column(column, justify="left" if column in ("method", "setting") else "right", no_wrap=True)
        for _, method, setting in (key for key in methods if key[0] == model and key[1] != "fp"):
            cells = [_mean(excess(rows, model, method, setting, text).values()) for text in (*COLUMNS, None)]
            cells += [
                _metric(rows, model, method, setting, name)
                for name in ("size_ratio", "calibration_seconds", "peak_gb")
            ]
            table.add_row(method, setting, *cells)
        console.print(table)
    for line in problems:
        console.print(f"not measured: {line}"[:180], style="yellow", markup=False, soft_wrap=True)
    made = claims(rows)
    for entry in made:
        verdict = "pass       " if entry["holds"] else "falls short"
        style = "green" if entry["holds"] else "red"
        text = f"{verdict} {entry['id']} {entry['value']:.4g} {entry['compare']} {entry['target']:g}"
        console.print(text, style=style, markup=False, soft_wrap=True)
    for name in wanted:
        if name not in {entry["id"] for entry in made}:
            console.print(f"not made    {name}", style="yellow", markup=False, soft_wrap=True)


def _mean(values) -> str:
    values = list(values)
    return f"{sum(values) / len(values):.4f}" if values else "-"


def _metric(rows: list[dict], model: str, method: str, setting: str, metric: str) -> str:
    wanted = {"model": model, "method": method, "setting": setting, "metric": metric}
    values = [r["value"] for r in rows if r["value"] is not None and all(r.get(k) == v for k, v in wanted.items())]
    return f"{sum(values) / len(values):.3g}" if values else ""
