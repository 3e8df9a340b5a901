"""Fuzzed surfaces: what each reads, how it is called, and what it may leave behind.

`fuzz(name, cases, seed, folder)` sends so many generated cases through a surface and returns their outcomes. A case is
`accepted`, `refused` (an explained failure), or a finding: an unexplained failure, a changed result, or files left by
a case that failed.
"""

import contextlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from tests.hostile.outcomes import tree, unexplained


class Changed(Exception):
    """A damaged input was accepted and gave another result."""


@dataclass(frozen=True)
class Surface:
    """A way in.

    Args:
        strategy: cases.
        run: takes a case and the surface's folder (the working directory meanwhile); raises to refuse.
        prepare: fills the folder; once.
        writes: names that `run` may create when it succeeds; a failed case must leave the folder as it was.
    """

    strategy: st.SearchStrategy
    run: Callable[[Any, Path], None]
    prepare: Callable[[Path], None] = lambda folder: None
    writes: bool = False


@dataclass
class Outcomes:
    """Counts by outcome, and every finding."""

    counts: Counter = field(default_factory=Counter)
    findings: list[dict] = field(default_factory=list)

    def add(self, kind: str, case: Any = None, why: str = "") -> None:
        """Count one case; keep it if it is a finding."""
        self.counts[kind] += 1
        if kind in ("unexplained", "partial"):
            self.findings.append({"kind": kind, "case": repr(case)[:600], "why": why[:900]})

    @property
    def total(self) -> int:
        """Cases run."""
        return sum(self.counts.values())


@contextlib.contextmanager
def _inside(folder: Path):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def fuzz(surface: Surface, cases: int, seed: int, folder: Path) -> Outcomes:
    """Send `cases` generated cases through a surface. `folder` must be empty; it is left as prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    surface.prepare(folder)
    template = folder.with_name(folder.name + ".template")
    if surface.writes:
        shutil.copytree(folder, template, symlinks=True)
    clean, found = tree(folder) if surface.writes else {}, Outcomes()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(surface.strategy)
    def one(case):
        silence, failed = io.StringIO(), False
        try:
            with _inside(folder), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                surface.run(case, folder)
            kind, why = "accepted", ""
        except Exception as error:
            why = str(error) if isinstance(error, Changed) else unexplained(error)
            kind, failed = ("unexplained" if why else "refused"), True
        except SystemExit as stop:
            why = unexplained(stop)
            kind, failed = ("unexplained" if why else "accepted" if not stop.code else "refused"), bool(stop.code)
        if surface.writes:
            left = tree(folder)
            if left != clean:
                if failed:
                    changed = sorted(name for name in {*left, *clean} if left.get(name) != clean.get(name))
                    kind, why = "partial", f"{why or kind}; left {changed[:5]}"
                shutil.rmtree(folder)
                shutil.copytree(template, folder, symlinks=True)
        found.add(kind, case, why or "")

    one()
    shutil.rmtree(template, ignore_errors=True)
    return found
