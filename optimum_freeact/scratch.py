"""Hidden folders for what is being written, and the removal of those that a killed process left."""

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
