"""Reading JSON files, and writing text files as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_whole(file: Path, text: str) -> None:
    """Write a file so that a crash in the middle leaves the old one, or none."""
    # In the same folder: only within one file system is a rename atomic.
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise naming(error, file) from error


def naming(error: OSError, file: Path) -> OSError:
    """Return the same error with the file in its message.

    Python names the file when opening it fails, but not when writing to it does (a full disk).
    """
    return OSError(error.errno, error.strerror or str(error), str(file))


def read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises ValueError naming the file if it does not hold one, and OSError if it cannot be read.
    All JSON files of this project are read here, so no file's bytes can lead to another exception.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    # RecursionError: brackets that are nested deeper than the parser can follow.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return values
