"""Print the lower bounds of pyproject.toml as exact versions, one a line, for `pip install --constraint`.

    python -m tools.lower_bounds > lowest.txt && PIP_CONSTRAINT=lowest.txt make test

Needs nothing but the standard library, so that it runs before anything is installed; Python 3.10 has no `tomllib`,
hence the two regular expressions. The bounds of tools for development are left alone.
"""

import re
from pathlib import Path


PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
NOT_OURS = ("dev", "docs", "peers")  # extras for those who work on Concord


def lower_bounds(text: str) -> dict[str, str]:
    """Name to lowest version, over the dependencies and the extras that a user can ask for."""
    lists = dict(re.findall(r"^([\w-]+) = (\[(?:[^\]\"]|\"[^\"]*\")*\])", text, re.MULTILINE))
    extras = re.findall(r"^([\w-]+) = ", _section(text, "project.optional-dependencies"), re.MULTILINE)
    found: dict[str, str] = {}
    for name in ("dependencies", *extras):
        if name not in NOT_OURS:
            found |= dict(re.findall(r"\"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", lists[name]))
    return found


def _section(text: str, name: str) -> str:
    return text.partition(f"[{name}]\n")[2].partition("\n[")[0]


if __name__ == "__main__":
    for name, version in lower_bounds(PYPROJECT.read_text(encoding="utf-8")).items():
        print(f"{name}=={version}")
