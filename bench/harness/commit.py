"""Which commit the code is of. Needs no torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

UNKNOWN = "unknown"
# A copy of the tree without its history is told its commit by this variable.
VARIABLE = "NANOVLM_FAST_COMMIT"


def commit() -> str:
    """The commit of the code in use, or what `VARIABLE` says; UNKNOWN if neither is there."""
    return os.environ.get(VARIABLE) or LOADED


def changed(*paths: str) -> str:
    """The tracked files that now differ from those of the code in use; UNKNOWN without git."""
    return git("diff", "--name-only", LOADED, "--", *paths)


def git(*arguments: str) -> str:
    """What git prints about this tree; UNKNOWN if it fails or is not there."""
    call = ("git", *arguments)
    where = Path(__file__).parent
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=where)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return done.stdout.strip()


# Read at once: by the time that a long measurement is written, another commit may be checked out.
LOADED = git("rev-parse", "HEAD")
