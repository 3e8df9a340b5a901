"""Folders that appear whole or not at all: made hidden beside their place, then moved there."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import tempfile
from pathlib import Path


def scratch_beside(folder: Path) -> Path:
    """A new hidden folder beside `folder`; those that a killed process of this machine left there are removed.

    Its name says the machine and the process, so that a folder in use by another run is never taken for a left one.
    """
    mine = f".{folder.name}-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{glob.escape(mine)}*"):
        process = left.name.removeprefix(mine).partition("-")[0]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=folder.parent))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's
        return True
    return True


def refuse_foreign(folder: Path, sign: str, kind: str) -> None:
    """Refuse to replace anything but an earlier result of the same kind.

    Args:
        folder (`Path`): where the result goes; need not exist yet.
        sign (`str`): file by which an earlier result is known.
        kind (`str`): what it would be, for the message, such as `"an earlier report"`.

    Raises:
        `FileExistsError`: for a file, and for a folder with other content.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / sign).is_file():
        raise FileExistsError(f"{folder} exists and is not {kind}; choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder.")


def replace_folder(scratch: Path, folder: Path) -> None:
    """Move a finished folder to its place, over an older one of the same kind (see `refuse_foreign`)."""
    old = folder.with_name(f".{folder.name}-old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # what an interrupted replacement left
        os.replace(folder, old)
    os.replace(scratch, folder)
    os.chmod(folder, 0o755)
    shutil.rmtree(old, ignore_errors=True)
