"""What `adaptation.py` runs: arms, the choices that they have, in which order, and what earlier calls have measured."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arm:
    """Whose weights are frozen in, whose predictions are taught, whose stream, who writes."""

    merged: str | None = None
    teacher: str | None = None
    stream: str | None = None
    writer: str | None = None
    inside: bool = True

    def needs(self) -> list[str]:
        """Gifts that an arm takes; the texts alone are in the lessons of the target."""
        teacher = {None: "target", "shuffled": "real"}.get(self.teacher, self.teacher)
        found = [f"lessons {teacher}{'' if self.inside else ' shared'}"]
        found += [f"written {self.writer}"] if self.writer else []
        return found + [f"plans {giver}" for giver in (self.merged, self.stream) if giver not in (None, "zero")]


#: Most telling first.
ARMS = {
    "none": Arm(),
    "writer and teacher": Arm(teacher="real", writer="real"),
    "own texts and own teacher": Arm(teacher="target", writer="target"),
    "teacher": Arm(teacher="real"),
    "own teacher": Arm(teacher="target"),
    "own texts": Arm(writer="target"),
    "writer": Arm(writer="real"),
    "shrink": Arm(merged="zero"),
    "writer and teacher, random donor": Arm(teacher="random", writer="random"),
    "teacher, random donor": Arm(teacher="random"),
    "shuffled teacher": Arm(teacher="shuffled"),
    "merge": Arm(merged="real"),
    "merge, random donor": Arm(merged="random"),
    "merge, writer and teacher": Arm(merged="real", teacher="real", writer="real"),
    "teacher at shared positions": Arm(teacher="real", inside=False),
    "stream": Arm(stream="real"),
    "stream, random donor": Arm(stream="random"),
}
FEW, ALL = 40, 2000
SHORT, BROAD, LONG = ["1e-4:96x8", "5e-5:64x8"], ["1e-4:96x32"], ["1e-4:400x16", "2e-4:400x16"]
WIDE = ["rust", "french"]
#: Groups of arms with the same choices, first things first. Of the languages, Rust's standard library is adapted on because
#: the donor's lead over the target is largest there (`lead` rows, before any adaptation), and Python's to show a small lead.
PLAN = [
    {"tasks": WIDE, "texts": FEW, "settings": SHORT, "arms": ["none", "teacher", "shrink"]},
    {"tasks": WIDE, "texts": FEW, "settings": BROAD, "shares": [0.9], "arms": ["writer and teacher", "none"]},
    {
        "tasks": WIDE,
        "texts": FEW,
        "settings": SHORT,
        "shares": [0.5],
        "arms": ["teacher, random donor", "own teacher", "shuffled teacher"],
    },
    {"tasks": WIDE, "texts": FEW, "settings": BROAD, "shares": [0.9], "arms": ["writer and teacher, random donor"]},
    {"tasks": WIDE, "texts": FEW, "settings": SHORT[:1], "arms": ["merge", "merge, random donor"]},
    {"tasks": ["python"], "texts": FEW, "settings": SHORT, "arms": ["none", "teacher", "shrink"]},
    {"tasks": WIDE, "texts": FEW, "settings": BROAD, "shares": [0.9], "arms": ["own texts and own teacher"]},
    {
        "tasks": ["python"],
        "texts": FEW,
        "settings": SHORT,
        "shares": [0.5],
        "arms": ["own teacher", "teacher, random donor", "shuffled teacher"],
    },
    {"tasks": ["python"], "texts": FEW, "settings": BROAD, "shares": [0.9], "arms": ["writer and teacher", "none"]},
    {"tasks": WIDE, "texts": FEW, "settings": SHORT[:1], "shares": [0.5], "arms": ["teacher at shared positions"]},
    {"tasks": WIDE, "texts": FEW, "settings": SHORT[:1], "arms": ["stream", "stream, random donor"]},
    {"tasks": WIDE, "texts": ALL, "settings": LONG, "shares": [0.5], "arms": ["none", "teacher"]},
]


@dataclass(frozen=True)
class Setting:
    """What an arm may choose: learning rate, steps of so many texts, share of the lessons in the loss."""

    rate: float
    steps: int
    batch: int
    share: float = 0.0


@dataclass(frozen=True)
class Job:
    """A gift to prepare (`name` of a file) or a run of an arm, for one task, seed and number of given texts."""

    task: str
    seed: int
    texts: int
    name: str
    setting: Setting | None = None


def measured(files: list[Path] | None) -> set[Job]:
    """What the rows of earlier calls hold already."""
    found = set()
    for row in (json.loads(line) for file in files or [] for line in file.read_text().splitlines() if line.strip()):
        if row["metric"] == "lead":
            found.add(Job(row["task"], 0, 0, "lead"))
        elif (row.get("when"), row["metric"]) == ("after", "nll"):
            choice = Setting(row["rate"], row["steps"], row["batch"], row.get("share", 0.0))
            found.add(Job(row["task"], row["seed"], row["texts"], row["arm"], choice))
    return found


def groups(options: argparse.Namespace) -> list[dict]:
    """Arms with what they may choose: those of the command line, of a file, or `PLAN`."""
    own = {name: getattr(options, name) for name in ("tasks", "arms", "seeds", "settings", "shares", "texts")}
    plan = [{}] if options.arms else json.loads(options.plan.read_text()) if options.plan else PLAN
    made = [own | group for group in plan]
    for group in made:
        group["tasks"] = [task for task in group["tasks"] if task in options.tasks]
        group["settings"] = [setting(one) if isinstance(one, str) else one for one in group["settings"]]
    return made


def setting(text: str) -> tuple[float, int, int]:
    """`RATE:STEPSxBATCH`."""
    rate, _, size = text.partition(":")
    steps, _, batch = size.partition("x")
    return float(rate), int(steps), int(batch)
