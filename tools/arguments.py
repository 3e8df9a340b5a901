"""What the examples' command lines ask of their arguments."""

import argparse
from pathlib import Path


def existing(name: str) -> Path:
    """A file or folder that is here: said before any work, and not by whoever opens it."""
    path = Path(name)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder {name!r} here")
    return path
