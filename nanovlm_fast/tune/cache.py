"""What was measured before: one file per key, in ~/.cache/nanovlm_fast/tuned.

    {"schema": 1, "key": {...}, "date": ..., "seconds": ..., "done": true, "measuring": "",
     "plain": {...}, "choice": {...}, "rows": [{...}, ...]}

A file is written whole or not at all, after every candidate: a measurement that is killed leaves
what it knew, and the name of the candidate that it died of. A damaged file counts as none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovlm_fast.command import one_line
from nanovlm_fast.files import read_json, write_whole
from nanovlm_fast.paths import cache_folder
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.key import hash_of_key
from nanovlm_fast.tune.search import LEFT_OUT, TOGETHER, WHOLE, Found, Row

SCHEMA = 1


@dataclass
class Entry:
    """A file of the cache."""

    key: dict[str, Any]
    plain: Choice
    choice: Choice
    rows: list[Row] = field(default_factory=list)
    done: bool = False
    measuring: str = ""
    seconds: float = 0.0
    date: str = ""

    @classmethod
    def of(cls, key: dict[str, Any], plain: Choice, found: Found, seconds: float) -> Entry:
        """The entry for what a search has found so far."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rest = found.rows, found.done, found.measuring, round(seconds, 1), now
        return cls(key, plain, found.choice, *rest)

    def left_out(self) -> dict[str, str]:
        """The candidates that are not tried again, and why."""
        failed = {row.name: row.why for row in self.rows if row.verdict == LEFT_OUT}
        if self.measuring and not self.done:
            failed[self.measuring] = "the process that timed it died"
        return failed

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "key": self.key,
            "date": self.date,
            "seconds": self.seconds,
            "done": self.done,
            "measuring": self.measuring,
            "plain": self.plain.to_json(),
            "choice": self.choice.to_json(),
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        """The entry that `to_json` wrote. Raises ValueError for anything else."""
        kinds = {"key": dict, "rows": list, "done": bool, "measuring": str, "date": str}
        if values.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {values.get('schema')!r:.40}")
        for name, kind in kinds.items():
            if type(values.get(name)) is not kind:
                raise ValueError(f"its {name} is {values.get(name)!r:.40}")
        if type(values.get("seconds")) not in (int, float):
            raise ValueError(f"its seconds are {values.get('seconds')!r:.40}")
        return cls(
            key=values["key"],
            plain=Choice.from_json(values.get("plain")),
            choice=Choice.from_json(values.get("choice")),
            rows=[Row.from_json(row) for row in values["rows"]],
            done=values["done"],
            measuring=values["measuring"],
            seconds=values["seconds"],
            date=values["date"],
        )


def folder() -> Path:
    """Where the files are. Raises OSError for a user without a home folder."""
    return cache_folder() / "tuned"


def file_of(key: dict[str, Any]) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", str(key["device"]).lower()).strip("-")[:60]
    return folder() / f"{slug}-{hash_of_key(key)}.json"


def read(key: dict[str, Any]) -> Entry | None:
    """The entry for a key; None if there is none, or none that can be read."""
    try:
        file = file_of(key)
    except OSError:  # a measurement warns of it when it has something to keep
        return None
    try:
        if not file.exists():
            return None
        entry = read_entry(file)
    except (OSError, ValueError) as error:
        print(f"warning: {file} is of no use ({error}): what it held is measured again")
        return None
    # JSON knows no tuples: the keys are compared as they are written.
    return entry if hash_of_key(entry.key) == hash_of_key(key) else None


def read_entry(file: Path) -> Entry:
    """Raises OSError or ValueError if the file is not an entry."""
    return Entry.from_json(read_json(file))


def write(entry: Entry) -> None:
    """Write an entry. Raises OSError if that is not possible."""
    file = file_of(entry.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Several runs may measure at once: each writes a file of its own before it takes the place.
    own = file.with_name(f".{os.getpid()}.{file.name}")
    write_whole(own, json.dumps(entry.to_json(), indent=2) + "\n")
    try:
        os.replace(own, file)
    except OSError:
        with contextlib.suppress(OSError):
            own.unlink()
        raise


def acquit(key: dict[str, Any]) -> None:
    """Note that a measurement for the key was stopped, and did not die of what it was timing."""
    entry = read(key)
    if entry and entry.measuring:
        with contextlib.suppress(OSError):
            write(dataclasses.replace(entry, measuring=""))


def give_up(entry: Entry, why: str) -> Entry:
    """Keep plain for an entry whose last comparison, that of the whole step, ended its process."""
    row = Row(TOGETHER, WHOLE, LEFT_OUT, why)
    entry = dataclasses.replace(
        entry, choice=entry.plain, rows=[*entry.rows, row], measuring="", done=True
    )
    with contextlib.suppress(OSError):
        write(entry)
    return entry


def newest() -> Entry | None:
    """The entry that was written last, of any key; None if there is none that can be read.

    Raises OSError where there is no place for a cache.
    """
    files = sorted(folder().glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            return read_entry(file)
    return None


class Notebook:
    """The `note` of a search: its end loses nothing. An unwritable cache is one warning."""

    def __init__(
        self,
        key: dict[str, Any],
        plain: Choice,
        began: float,
        say: Callable[[str], None] = print,
    ):
        self.key = key
        self.plain = plain
        self.began = began
        self.say = say
        self.writable = True
        self.last = Found(plain)

    def __call__(self, found: Found) -> None:
        self.last = found
        if not self.writable:
            return
        entry = Entry.of(self.key, self.plain, found, time.monotonic() - self.began)
        try:
            write(entry)
        except OSError as error:
            self.writable = False
            self.say(f"warning: what was measured is not kept: {one_line(error)}")

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around a search: Ctrl-C is no death of the candidate that is being timed."""
        try:
            yield
        except KeyboardInterrupt:
            self.last.measuring = ""
            self(self.last)
            raise
