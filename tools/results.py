"""Read the benchmarks' results: check every claim, and keep the numbers in README and docs equal to them.

    python -m tools.results check                  # all claims, pass or falls short; fails when one does not follow
    python -m tools.results table accuracy         # a table, as Markdown
    python -m tools.results update [--check]       # fill the marked places of README.md and docs/ (or: are they so?)

README and docs state no measured number of their own. A place for one is marked, and what stands between the marks is
written by `update`:

    <!-- results:accuracy metric=perplexity model=smollm2 rows=method columns=setting -->  ...  <!-- /results -->
    <!-- results:accuracy claims -->  ...  <!-- /results -->         all claims of a benchmark, as a table
    <!-- results:accuracy claim=accuracy.smollm2.size_ratio -->  ...  <!-- /results -->        one claim's value, inline
    <!-- results:accuracy claim=accuracy.smollm2.size_ratio verdict -->  ...        the same with its goal, and whether it holds
    <!-- results:accuracy value metric=nll method=fp -->  ...  <!-- /results -->        one measurement, inline

In a table, `rows` and `columns` (default `method` and `setting`; several fields with commas) span it, `digits` (default
4) is the number of significant digits, and every other `field=value` (alternatives with commas) selects rows. Rows that
still differ in another field become tables of their own, so that nothing is averaged but seeds.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import sys
from pathlib import Path

from tools.result_files import RESULTS, ROOT, problems, read


MARK = re.compile(r"<!-- results:(?P<query>[^\n]*?) -->(?P<body>.*?)<!-- /results -->", re.DOTALL)
OPENING = re.compile(r"<!-- results:")
NOT_IDENTITY = {"value", "spread", "seed", "note"}


def check(folder: Path = RESULTS) -> tuple[list[str], list[str]]:
    """Lines that report every claim of `folder`, and the list of everything that is wrong."""
    lines, wrong, owners = [], [], {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = read(path)
        except ValueError as error:
            wrong.append(str(error))
            continue
        found = problems(document)
        if document.get("benchmark") != path.stem:
            found.append(f"benchmark is {document.get('benchmark')!r}, the file is named {path.stem!r}")
        wrong += [f"{path.name}: {problem}" for problem in found]
        claims = document.get("claims") if isinstance(document.get("claims"), list) else []
        for claim in claims if not found else []:
            if claim["id"] in owners:
                wrong.append(f"{path.name}: claim {claim['id']} is also in {owners[claim['id']]}")
            owners[claim["id"]] = path.name
            verdict = "pass       " if claim["holds"] else "falls short"
            note = "  (dirty tree)" if document["dirty"] else ""
            lines.append(
                f"{verdict}  {claim['id']}  {number(claim['value'])} {claim['compare']} {number(claim['target'])}{note}"
            )
    return lines, wrong


def table(document: dict, options: list[str]) -> str:
    """Markdown for one marked place; `options` are the words after the benchmark's name."""
    flags = {word for word in options if "=" not in word}
    chosen = dict(word.split("=", 1) for word in options if "=" in word)
    if unknown := flags - {"claims", "value", "verdict"}:
        raise ValueError(
            f"Unknown word {sorted(unknown)} in a results mark; known: claims, value, verdict, field=value."
        )
    digits = int(chosen.pop("digits", 4))
    if "claims" in flags:
        return _claims_table(document, digits)
    if "claim" in chosen:
        found = _one(document["claims"], "id", chosen["claim"])
        value, goal = number(found["value"], digits), number(found["target"], digits)
        if "verdict" not in flags:
            return value
        return f"{value} ({found['compare']} {goal}: {'holds' if found['holds'] else '**falls short**'})"
    span = {key: chosen.pop(key, default).split(",") for key, default in (("rows", "method"), ("columns", "setting"))}
    rows = _select(document["rows"], chosen)
    if "value" in flags:
        rest = _varying(rows, set())
        if rest:
            raise ValueError(f"A single value must be one measurement, but rows still differ in {rest}; select one.")
        return _cell(rows, digits)
    return _tables(rows, span["rows"], span["columns"], digits) + "\n\n" + _caption(document)


def _one(entries: list[dict], key: str, value: str) -> dict:
    for entry in entries:
        if entry[key] == value:
            return entry
    raise ValueError(f"No claim {value!r}; there are {[entry[key] for entry in entries]}.")


def _select(rows: list[dict], wanted: dict[str, str]) -> list[dict]:
    for field, text in wanted.items():
        there = sorted({str(row.get(field)) for row in rows})
        values = [text] if text in there else text.split(",")  # a value may hold a comma itself
        if missing := [value for value in values if value not in there]:
            raise ValueError(f"No row has {field}={','.join(missing)}; there are {there}.")
        rows = [row for row in rows if str(row.get(field)) in values]
    return rows


def _varying(rows: list[dict], spanned: set[str]) -> list[str]:
    """Fields in which rows differ, other than the spanned ones and those that hold the measurement itself."""
    fields = dict.fromkeys(key for row in rows for key in row if key not in NOT_IDENTITY | spanned)
    return [field for field in fields if len({str(row.get(field)) for row in rows}) > 1]


def _tables(rows: list[dict], down: list[str], across: list[str], digits: int) -> str:
    apart = _varying(rows, {*down, *across})
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.get(field)) for field in apart), []).append(row)
    parts = []
    for key, members in groups.items():
        title = ", ".join(f"{field} {value}" for field, value in zip(apart, key, strict=True))
        body = _pivot(members, down, across, digits)
        parts.append(f"**{title}**\n\n{body}" if title else body)
    return "\n\n".join(parts)


def _pivot(rows: list[dict], down: list[str], across: list[str], digits: int) -> str:
    cells: dict[tuple, list[dict]] = {}
    heads: dict[tuple, None] = {}
    sides: dict[tuple, None] = {}
    for row in rows:
        side, head = (tuple(str(row.get(field, "")) for field in fields) for fields in (down, across))
        sides[side] = heads[head] = None
        cells.setdefault((side, head), []).append(row)
    lines = [[*down, *(" ".join(head) for head in heads)], ["---"] * len(down) + ["---:"] * len(heads)]
    lines += [[*side, *(_cell(cells.get((side, head), []), digits) for head in heads)] for side in sides]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(rows: list[dict], digits: int) -> str:
    """Mean over seeds, with the standard deviation when there are several (else the spread the row itself states)."""
    values = [row["value"] for row in rows if row["value"] is not None]
    if not values:
        return "failed" if rows else "–"
    text = number(statistics.fmean(values), digits)
    if len(values) > 1:
        text += f" ± {number(statistics.stdev(values), 2)}"
    elif rows[0].get("spread"):
        text += f" ± {number(rows[0]['spread'], 2)}"
    return text + (" (some failed)" if len(values) < len(rows) else "")


def _claims_table(document: dict, digits: int) -> str:
    lines = ["| claim | measured | target | |", "| --- | ---: | ---: | --- |"]
    for claim in document["claims"]:
        verdict = "pass" if claim["holds"] else "falls short"
        target = f"{claim['compare']} {number(claim['target'], digits)}"
        lines.append(f"| `{claim['id']}` | {number(claim['value'], digits)} | {target} | {verdict} |")
    return "\n".join(lines) + "\n\n" + _caption(document)


def _caption(document: dict) -> str:
    dirty = " on a changed tree" if document["dirty"] else ""
    seeds = ", ".join(map(str, document["seeds"]))
    return (
        f"<sub>`{document['command']}` at {document['commit'][:10]}{dirty}, {document['date']}, "
        f"{document['machine']}, seeds {seeds}</sub>"
    )


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, never in powers of ten when it is of everyday size."""
    if value == 0:
        return "0"
    if abs(value) >= 10**digits and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def fill(text: str, folder: Path = RESULTS) -> str:
    """The text with every marked place written anew from the result files in `folder`."""

    def replace(match: re.Match) -> str:
        name, *options = shlex.split(match["query"])
        path = folder / f"{name}.json"
        if not path.is_file():
            there = sorted(other.stem for other in folder.glob("*.json"))
            raise ValueError(f"A mark names results {name!r}; there are {there}.")
        body = table(read(path), options)
        body = f"\n{body}\n" if "|" in body else body
        return f"<!-- results:{match['query']} -->{body}<!-- /results -->"

    if len(OPENING.findall(text)) != len(MARK.findall(text)):
        raise ValueError("A results mark is not closed by <!-- /results -->.")
    return MARK.sub(replace, text)


def pages(root: Path = ROOT) -> list[Path]:
    """The files that may hold marks: README.md and everything below docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def update(root: Path = ROOT, folder: Path = RESULTS, write: bool = True) -> list[Path]:
    """Fill all pages; returns those that changed (or, with `write=False`, would change)."""
    changed = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        try:
            filled = fill(text, folder)
        except ValueError as error:
            raise ValueError(f"{page.relative_to(root)}: {error}") from error
        if filled != text:
            changed.append(page)
            if write:
                page.write_text(filled, encoding="utf-8")
    return changed


def main(arguments: list[str] | None = None, root: Path = ROOT, folder: Path = RESULTS) -> int:
    """Command line; 0 when everything follows, 1 when something does not."""
    parser = argparse.ArgumentParser(prog="python -m tools.results", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="verb", required=True)
    commands.add_parser("check", help="print all claims and verify each against its rows")
    shown = commands.add_parser("table", help="print one table as Markdown")
    shown.add_argument("name")
    shown.add_argument("options", nargs="*", help="as in a mark: metric=nll rows=method claims ...")
    filled = commands.add_parser("update", help="write the marked places of README.md and docs/")
    filled.add_argument("--check", action="store_true", help="change nothing, fail when a page is out of date")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.verb == "check":
            lines, wrong = check(folder)
            print("\n".join(lines) or "No result files yet.")
            for problem in wrong:
                print(f"WRONG  {problem}", file=sys.stderr)
            return bool(wrong)
        if parsed.verb == "table":
            path = folder / f"{parsed.name}.json"
            if not path.is_file():
                there = sorted(other.stem for other in folder.glob("*.json"))
                raise ValueError(f"No results {parsed.name!r}; there are {there}.")
            print(table(read(path), parsed.options))
            return 0
        changed = update(root, folder, write=not parsed.check)
    except ValueError as error:
        print(f"WRONG  {error}", file=sys.stderr)
        return 1
    for page in changed:
        print(
            f"{page.relative_to(root)} {'is out of date: run python -m tools.results update' if parsed.check else 'written'}"
        )
    return bool(changed) and parsed.check


if __name__ == "__main__":
    sys.exit(main())
