"""Folders among the options: a run keeps them from the root of the file system, and can be resumed from anywhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDERS = ("vision", "language", "start_from", "lm_tokenizer")  # each a folder or a hub name
MADE = "train"  # --lm-tokenizer: one that is made from the data, whatever folder has that name
DATA = ("data", "eval")  # see `split_data`


def absolute_paths(options: Mapping[str, Any]) -> dict[str, str]:
    """Those of a configuration's options that may name a folder; a hub's and a data set's name stay as they are."""
    found = {
        name: absolute(options[name]) for name in FOLDERS if isinstance(options.get(name), str)
    }
    for name in DATA:
        if isinstance(options.get(name), str):
            before, place, after = split_data(options[name])
            found[name] = before + absolute(place) + after
    if options.get("out"):
        found["out"] = os.path.expanduser(options["out"])
    return found


def absolute(name: str) -> str:
    """The path of a folder that is there, `~` expanded; any other name as it is."""
    folder = os.path.expanduser(name)
    return os.path.abspath(folder) if name not in ("", MADE) and os.path.isdir(folder) else name


def split_data(data: str) -> tuple[str, str, str]:
    """What stands before a data set's folder in --data, the folder or hub name, and what stands after it."""
    kind, colon, rest = data.partition(":")
    if kind in ("jsonl", "prepared", "mmstar") and rest:
        return f"{kind}:", rest, ""
    if data in ("easy_vqa", "mmstar") or kind == "synthetic":
        return data, "", ""
    if os.path.isdir(os.path.expanduser(data)):
        return "", data, ""
    return "", kind, colon + rest


def without_path(data: str) -> str:
    """A data set's name for others to read: no path of the machine that has it."""
    before, place, after = split_data(data)
    named = bool(before and place) or os.path.isabs(place)
    return before + (Path(place).name if named else place) + after


def inside(options: Mapping[str, Any], folder: Path) -> str | None:
    """The first of `absolute_paths` that lies in this folder, as it would be given, or None."""
    for name in (*FOLDERS, *DATA):
        place = split_data(options[name])[1] if name in DATA else options[name]
        if os.path.isabs(place) and Path(place).resolve().is_relative_to(folder.resolve()):
            return f"--{name.replace('_', '-')} {options[name]}"
    return None


def at_home(name: str) -> Path:
    """The path with the home folder for `~`: a shell leaves that alone in --data jsonl:~/FOLDER."""
    with contextlib.suppress(RuntimeError):  # ~NOBODY
        return Path(name).expanduser()
    return Path(name)
