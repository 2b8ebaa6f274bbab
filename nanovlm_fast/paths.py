"""Paths as a user writes them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def at_home(name: str) -> Path:
    """Return the path with `~` expanded, which a shell does not do inside --data jsonl:~/FOLDER."""
    with contextlib.suppress(RuntimeError):  # ~NAME of a user that does not exist
        return Path(name).expanduser()
    return Path(name)


def cache_folder() -> Path:
    """Return our folder under $XDG_CACHE_HOME, which must be absolute, or else ~/.cache.

    Raises OSError for a user without a home folder, as a container's may be.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        try:
            caches = Path.home() / ".cache"
        except RuntimeError as error:
            raise OSError("no home folder: set HOME or XDG_CACHE_HOME") from error
    return caches / "nanovlm_fast"
