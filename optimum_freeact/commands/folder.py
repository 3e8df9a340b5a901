"""Output that appears whole or not at all: everything is written beside its place and renamed in the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optimum_freeact.scratch import scratch_beside


# a folder that holds one of these was written by us or by save_pretrained, so --overwrite may replace it
OURS = ("config.json", "comparison.json")


def check_free(out: Path, overwrite: bool, inputs: Iterable[str | os.PathLike | None] = ()) -> None:
    """Refuse, before any work, a place that cannot be written or must not be replaced.

    Args:
        out (`Path`): The folder to be.
        overwrite (`bool`): Whether a folder with an earlier result there may be replaced.
        inputs: Files and folders that are read; none may lie in a folder that is replaced.

    Raises:
        `ValueError`: naming the folder and what to do.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{str(out)!r} exists and is no folder; name another one.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{str(out)!r} exists and is not empty; name another folder, or pass --overwrite.")
    if not any((out / name).is_file() for name in OURS):
        raise ValueError(
            f"{str(out)!r} holds none of {list(OURS)}, so it is no earlier result: --overwrite does not replace it."
        )
    whole = out.resolve()
    for path in (Path(item).resolve() for item in [*inputs, Path.cwd()] if item):
        if path == whole or whole in path.parents:
            raise ValueError(f"{str(out)!r} cannot be replaced: {str(path)!r}, which is in use, lies in it.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and vanishes when it does not.

    An earlier result stays until the new one is complete. Call [`check_free`] first.
    """
    out = Path(os.path.abspath(out))
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_beside(out)
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        yield fresh
        if out.exists():
            out.rename(scratch / "old")
        try:
            fresh.rename(out)
        except OSError:
            if (scratch / "old").exists():
                (scratch / "old").rename(out)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if not out.exists():
            for parent in made:
                if any(parent.iterdir()):
                    break
                parent.rmdir()


def check_file(path: str | None) -> None:
    """Refuse a place for a file that is a folder.

    Raises:
        `ValueError`: naming it.
    """
    if path is not None and Path(path).is_dir():
        raise ValueError(f"{path!r} is a folder; name the file to write.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON (never NaN) through a temporary file."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
