"""Whether a disk can hold what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start when a disk cannot hold what is about to be written.

    Args:
        folder (`Path`): where it goes; need not exist yet.
        needed (`int`): bytes.
        what (`str`): what they are, and how to need fewer, for the message.

    Raises:
        `OSError`: with both amounts.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / 1e9:.3g} GB free, but up to {needed / 1e9:.3g} GB go there: {what}.")
