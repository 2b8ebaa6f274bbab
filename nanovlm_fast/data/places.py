"""Folders among the options.

A run stores them as absolute paths, so that it can be resumed from any folder. A model card shows
none of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovlm_fast.data.sources.registry import SOURCES, takes

FOLDER_OPTIONS = ("vision", "language", "start_from", "lm_tokenizer")  # a folder or a hub name each
DATA_OPTIONS = ("data", "eval")  # a folder may be inside of the value: see `split_data`
# --lm-tokenizer train makes a tokenizer from the data, also where a folder has that name.
FROM_DATA = "train"


def absolute_paths(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the options that may name a folder, with absolute paths.

    Names of the hub and of data sets stay as they are.
    """
    found = {
        name: absolute(options[name])
        for name in FOLDER_OPTIONS
        if isinstance(options.get(name), str)
    }
    for name in DATA_OPTIONS:
        if isinstance(options.get(name), str):
            before, place, after = split_data(options[name])
            found[name] = before + absolute(place) + after
    if options.get("out"):
        found["out"] = os.path.expanduser(options["out"])
    return found


def absolute(name: str) -> str:
    """Return the absolute path of an existing folder, `~` expanded, or any other name as is."""
    folder = os.path.expanduser(name)
    # A relative path is resolved only if it exists, since "OWNER/NAME" is a hub name as well.
    return (
        os.path.abspath(folder) if name not in ("", FROM_DATA) and os.path.isdir(folder) else name
    )


def split_data(data: str) -> tuple[str, str, str]:
    """Split a value of --data around its folder or hub name: (before, name, after)."""
    name, colon, rest = data.partition(":")
    kind = SOURCES.get(name)
    # Before folders of the same name, as `load_source` reads it.
    if kind is not None and takes(kind, bool(colon), rest):
        return (f"{name}:", rest, "") if rest and f"{name}:FOLDER" in kind.FORMS else (data, "", "")
    # Before the split at a colon: a folder's own name may contain one.
    if os.path.isdir(os.path.expanduser(data)):
        return "", data, ""
    return "", name, colon + rest


def without_path(data: str) -> str:
    """Return a data set's name without the path of the machine that has it, for model cards."""
    before, place, after = split_data(data)
    named = bool(before and place) or os.path.isabs(place)
    return before + (Path(place).name if named else place) + after


def inside(options: Mapping[str, Any], folder: Path) -> str | None:
    """Return the first option whose path lies in `folder`, as on a command line, or None."""
    for name in (*FOLDER_OPTIONS, *DATA_OPTIONS):
        place = split_data(options[name])[1] if name in DATA_OPTIONS else options[name]
        if os.path.isabs(place) and Path(place).resolve().is_relative_to(folder.resolve()):
            return f"--{name.replace('_', '-')} {options[name]}"
    return None
