"""Writes what a search has found so far into the cache, so that its end loses nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from nanovlm_fast.command import one_line
from nanovlm_fast.tune import cache
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.search import Found


class Notebook:
    """The `note` of a search. A cache that cannot be written is one warning."""

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
            cache.write(entry)
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
