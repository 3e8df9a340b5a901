"""The kernel in C for CPUs."""

from __future__ import annotations


def obstacle() -> str | None:
    """Why it cannot run here, or `None`."""
    return "it is not built"
