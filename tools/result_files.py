"""The one form of a benchmark's result: what it must hold, how it is stamped, written and read back.

A benchmark measures `rows` and has a pure function `claims(rows)` in a module of its own; `write` stamps the rows with
commit, date and machine, derives the claims and writes `benchmarks/results/<name>.json`, whole or not at all.
`tools/results.py` reads those files: it repeats the derivation and fills the tables of README and docs.

A row is a flat dict with at least `metric` and `value`; what identifies it (model, method, setting, seed, ...) is up to
the benchmark. A value that could not be measured is `None` and the row says why under `note`. Losers and controls are
rows too. A claim is made with `claim(...)`, so `holds` is never typed by hand.

    # benchmarks/accuracy/claims.py
    def claims(rows):
        return [claim("accuracy.smollm2.size_ratio", ratio(rows), "<=", 0.30, "bytes[freeact] / bytes[bf16]")]

    # benchmarks/accuracy/run.py
    write("accuracy", rows, "benchmarks.accuracy.claims", command=command_line(), seeds=[0, 1, 2])
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIELDS = ("benchmark", "command", "commit", "dirty", "date", "machine", "seeds", "claims_from", "rows", "claims")
CLAIM_FIELDS = ("id", "value", "compare", "target", "holds", "how")
COMPARE = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq}
TOLERANCE = 1e-9  # relative difference allowed between a stored claim and the one derived again


def claim(name: str, value: float, compare: str, target: float, how: str) -> dict:
    """A claim as the files hold it; `holds` follows from value, compare and target."""
    if compare not in COMPARE:
        raise ValueError(f"compare must be one of {sorted(COMPARE)}, got {compare!r} for claim {name!r}.")
    value, target = float(value), float(target)
    holds = math.isfinite(value) and COMPARE[compare](value, target)
    return {"id": name, "value": value, "compare": compare, "target": target, "holds": holds, "how": how}


def derive(document: dict) -> list[dict]:
    """The claims that the benchmark's own function makes of the document's rows."""
    function = getattr(importlib.import_module(document["claims_from"]), "claims", None)
    if not callable(function):
        raise ValueError(f"claims_from={document['claims_from']!r} has no function claims(rows).")
    return function(document["rows"])


def problems(document: dict) -> list[str]:
    """Everything wrong with a result document; empty when each claim follows from the rows."""
    found = [f"lacks {field!r}" for field in FIELDS if field not in document]
    found += [f"has unknown field {field!r}" for field in document if field not in FIELDS]
    if found:
        return found
    found += _stamp_problems(document) + _row_problems(document["rows"])
    stored = document["claims"]
    for entry in stored:
        found += _claim_problems(entry)
    if found:
        return found
    try:
        derived = derive(document)
    except Exception as error:  # whatever a claims function raises means: the claims do not follow
        return [f"claims cannot be derived from the rows: {type(error).__name__}: {error}"]
    return _difference(stored, derived)


def _stamp_problems(document: dict) -> list[str]:
    found = []
    for field in ("benchmark", "command", "machine", "claims_from"):
        if not (isinstance(document[field], str) and document[field].strip()):
            found.append(f"{field} must be a text, got {document[field]!r}")
    if not re.fullmatch(r"[0-9a-f]{40}", str(document["commit"])):
        found.append(f"commit must be a full hash of 40 hex digits, got {document['commit']!r}")
    if not isinstance(document["dirty"], bool):
        found.append(f"dirty must be true or false, got {document['dirty']!r}")
    try:
        datetime.date.fromisoformat(document["date"])
    except (TypeError, ValueError):
        found.append(f"date must be like 2026-01-31, got {document['date']!r}")
    seeds = document["seeds"]
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        found.append(f"seeds must be a non-empty list of integers, got {seeds!r}")
    return found


def _row_problems(rows: list) -> list[str]:
    if not (isinstance(rows, list) and rows):
        return ["rows must be a non-empty list"]
    found = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not {"metric", "value"} <= row.keys():
            found.append(f"row {i} must be a dict with metric and value, got {row!r}")
            continue
        for key, value in row.items():
            if not isinstance(value, (str, int, float, type(None))):
                found.append(f"row {i}: {key} must be a plain value, got {value!r}")
            elif isinstance(value, float) and not math.isfinite(value):
                found.append(f"row {i}: {key} is {value}; write null and say why under note")
        if row["value"] is None and not row.get("note"):
            found.append(f"row {i}: value is null, so note must say why")
        elif row["value"] is not None and not _is_number(row["value"]):
            found.append(f"row {i}: value must be a number, got {row['value']!r}")
    return found


def _claim_problems(entry: dict) -> list[str]:
    name = entry.get("id", "without id")
    if set(entry) != set(CLAIM_FIELDS):
        return [f"claim {name} must have exactly the fields {list(CLAIM_FIELDS)}, got {sorted(entry)}"]
    if not all(_is_number(entry[key]) and math.isfinite(entry[key]) for key in ("value", "target")):
        return [f"claim {name}: value and target must be finite, got {entry['value']!r} and {entry['target']!r}"]
    if entry["compare"] not in COMPARE:
        return [f"claim {name}: compare must be one of {sorted(COMPARE)}, got {entry['compare']!r}"]
    if entry["holds"] is not COMPARE[entry["compare"]](entry["value"], entry["target"]):
        text = f"{entry['value']} {entry['compare']} {entry['target']}"
        return [f"claim {name}: holds is {entry['holds']!r}, which does not follow from {text}"]
    return []


def _difference(stored: list[dict], derived: list[dict]) -> list[str]:
    """How stored claims differ from derived ones: identity, wording, or value beyond `TOLERANCE`."""
    names, again = [entry["id"] for entry in stored], [entry["id"] for entry in derived]
    found = [f"claim {name} appears twice" for name in sorted({name for name in names if names.count(name) > 1})]
    found += [f"claim {name} does not follow from the rows" for name in names if name not in again]
    found += [f"claim {name} follows from the rows but is not in the file" for name in again if name not in names]
    by_name = {entry["id"]: entry for entry in derived}
    for entry in stored:
        other = by_name.get(entry["id"], entry)
        if not math.isclose(entry["value"], other["value"], rel_tol=TOLERANCE, abs_tol=0.0):
            found.append(f"claim {entry['id']}: stored value {entry['value']}, rows give {other['value']}")
        for key in ("compare", "target", "how"):
            if entry[key] != other[key]:
                found.append(f"claim {entry['id']}: {key} is {entry[key]!r}, the benchmark says {other[key]!r}")
    return found


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def write(
    name: str,
    rows: list[dict],
    claims_from: str,
    command: str,
    seeds: Iterable[int],
    machine: str | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Stamp rows, derive their claims, validate everything and write `<folder>/<name>.json` in one step.

    Raises:
        ValueError: when anything is wrong with the rows or claims (all problems are named); nothing is written then.
        RuntimeError: when the commit cannot be told.
    """
    commit, dirty = commit_and_dirty()
    try:
        rows = json.loads(json.dumps(rows))  # the claims must follow from what the file will hold
    except TypeError as error:
        raise ValueError(f"Rows of {name!r} are no plain JSON: {error}.") from error
    document = {
        "benchmark": name,
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.date.today().isoformat(),
        "machine": machine or machine_name(),
        "seeds": list(seeds),
        "claims_from": claims_from,
        "rows": rows,
    }
    if not (wrong := _row_problems(rows)):
        document["claims"] = derive(document)
        wrong = problems(document)
    if wrong:
        raise ValueError(f"Result {name!r} is not written: " + "; ".join(wrong) + ".")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.json"
    handle, scratch = tempfile.mkstemp(dir=folder, prefix=f".{name}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(render(document))
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return target


def render(document: dict) -> str:
    """JSON with one line per row and per claim, so that a difference between two runs can be read."""

    def lines(entries: list[dict]) -> str:
        return ",\n".join(f"    {json.dumps(entry, ensure_ascii=False, allow_nan=False)}" for entry in entries)

    parts = []
    for key, value in document.items():
        if key in ("rows", "claims"):
            parts.append(f'  "{key}": [\n{lines(value)}\n  ]' if value else f'  "{key}": []')
        else:
            parts.append(f'  "{key}": {json.dumps(value, ensure_ascii=False, allow_nan=False)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read(path: Path) -> dict:
    """One result file; raises `ValueError` naming the file when it is no JSON object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no JSON: {error}.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(document).__name__}.")
    return document


def command_line() -> str:
    """The command that started this process, with the script's path relative to the repository."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def without_places(command: str, options: Collection[str] = ("--rows", "--out")) -> str:
    """A command less the options, each with a value, that say where things lie on this machine."""
    parts, kept = iter(shlex.split(command)), []
    for part in parts:
        if part in options:
            next(parts, None)
        else:
            kept.append(part)
    return shlex.join(kept)


def commit_and_dirty() -> tuple[str, bool]:
    """Hash of the checked-out commit, and whether anything but result files differs from it.

    Where the code was copied without its history, `CONCORD_COMMIT=<hash>` or `<hash>-dirty` says it.
    """
    if given := os.environ.get("CONCORD_COMMIT"):
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results").strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            "A result must name its commit, but git cannot tell it here; set CONCORD_COMMIT=<hash>[-dirty]."
        ) from error
    return commit, bool(changed)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def machine_name() -> str:
    """GPU or CPU, and the versions that decide a number, in one line."""
    import torch

    if torch.cuda.is_available():
        parts = [f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"]
    else:
        parts = [f"{_cpu_name()} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    parts += [f"torch {torch.__version__}"]
    for package in ("transformers", "triton", "trl", "mergekit"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*parts, f"python {platform.python_version()}"])


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
