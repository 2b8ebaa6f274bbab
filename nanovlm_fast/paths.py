"""Paths as a user writes them."""

from __future__ import annotations

import contextlib
from pathlib import Path


def at_home(name: str) -> Path:
    """Return the path with `~` expanded, which a shell does not do inside --data jsonl:~/FOLDER."""
    with contextlib.suppress(RuntimeError):  # ~NAME of a user that does not exist
        return Path(name).expanduser()
    return Path(name)
