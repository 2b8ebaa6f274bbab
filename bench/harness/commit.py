"""Which commit the code is of. Needs no torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

UNKNOWN = "unknown"
# A copy of the tree without its history is told its commit by this variable.
VARIABLE = "NANOVLM_FAST_COMMIT"


def commit() -> str:
    """The commit that is checked out, or what `VARIABLE` says; UNKNOWN if neither is there."""
    return os.environ.get(VARIABLE) or git("rev-parse", "HEAD")


def git(*arguments: str) -> str:
    """What git prints about this tree; UNKNOWN if it fails or is not there."""
    call = ("git", *arguments)
    where = Path(__file__).parent
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=where)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return done.stdout.strip()
