"""Guards and damage for tests that feed random input to readers."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GIB = 2**30


class Hung(BaseException):
    """A case that ran out of its time. No `except Exception` takes it for damaged data."""


@contextlib.contextmanager
def at_most(seconds: float, case: Any) -> Iterator[None]:
    """Raise Hung, naming the case, if the block takes longer.

    The timer of pytest continues afterwards.
    """

    def hung(*_: Any) -> None:
        raise Hung(f"over {seconds} s: {case!r:.200}")

    handler = signal.signal(signal.SIGALRM, hung)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def no_gigabytes() -> Iterator[None]:
    """Limit the memory to 2 GiB beyond what the process has.

    The system refuses a larger allocation, and the tests of the readers do not accept that error.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * GIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten, repeated, or other bytes altogether; at times whole."""
    content, action = bytearray(whole), rng.randrange(7)
    if action == 0:
        return bytes(content[: rng.randrange(len(content) + 1)])
    if action == 1:
        return rng.randbytes(rng.choice((0, 1, 7, 8, 9, 100, len(content))))
    if action == 2:
        start = rng.randrange(len(content))
        content[start : start + rng.randint(1, 40)] = rng.randbytes(rng.randint(0, 40))
        return bytes(content)
    reach = min(len(content), rng.choice((16, 300, len(content))))  # headers are where it hurts
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(reach)
        content[place] = rng.choice(
            (content[place] ^ 1 << rng.randrange(8), 0, 255, *b'09-.e"[]{}:,')
        )
    return bytes(content) + (whole if action == 3 else b"")
