"""JSON files read, and text written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_whole(file: Path, text: str) -> None:
    """Write the file so that whoever is killed on the way leaves the old one, or none."""
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise naming(error, file) from error


def naming(error: OSError, file: Path) -> OSError:
    """The same error with the file in its message: one of writing, unlike one of opening, does not say where."""
    return OSError(error.errno, error.strerror or str(error), str(file))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError naming the file if it holds none, and OSError if it cannot be read.

    The only reader of JSON files here: whatever bytes are in one, no other error comes out.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # the second: brackets nested deeper than the parser goes
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return values
