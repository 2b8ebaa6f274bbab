"""Reports where a rank hangs, and ends it, so that torchrun can restart all ranks."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from nanovlm_fast.ranks import World

EXIT_HUNG = 70  # exit code of a rank that its watchdog ended
REPORTING = 3.0  # seconds that a report may take


class Watchdog:
    """Reports this process's stack when `beat` was not called for `seconds`, and exits with 70.

    The report goes to stderr and to RUN/hang-rank<r>.txt. Ranks that wait for a hung one hang too;
    they wait a tenth longer, so that the one at fault reports first. Where not even Python runs any
    more (a call that holds its lock), the interpreter's fault handler writes the stack to stderr
    after twice the time and exits with 1. With `seconds` 0 it never reports.
    """

    def __init__(self, seconds: float, run: Path, world: World):
        self.seconds = seconds
        self.file = run / f"hang-rank{world.rank}.txt"
        self.world = world
        self.main = threading.get_ident()
        self.stopped = threading.Event()
        # Before the thread starts, which reads what a beat sets.
        self.beat("starting")
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        if seconds:
            self.thread.start()

    def beat(self, doing: str, waiting: bool = False) -> None:
        """Note that this process is alive and what it does now; `waiting` means for other ranks."""
        self.doing = doing
        self.since = time.monotonic()
        self.limit = self.seconds * (1.1 if waiting else 1.0)
        if self.seconds:
            # Each call replaces the timer before it. It runs in C, without Python's lock.
            faulthandler.dump_traceback_later(2 * self.limit, exit=True)

    def pause(self) -> None:
        """Allow what follows any time: data and weights from far away, compiling."""
        self.beat("paused")
        self.limit = float("inf")
        faulthandler.cancel_dump_traceback_later()

    def evaluating(self) -> None:
        """Beat of the first rank while it evaluates; the others receive it in `evaluated`."""
        self.beat("evaluating")
        self.world.sum([1])

    def evaluated(self) -> None:
        """The first rank calls this once it has evaluated; the others wait here until then."""
        # An evaluation has as many beats as batches, which the other ranks do not know: they take
        # part in sums until one is 0, and each of them is a sign of life.
        going_on = 1.0
        while going_on:
            self.beat("waiting for the first rank's evaluation", waiting=True)
            (going_on,) = self.world.sum([0])

    def stop(self) -> None:
        """End the watch, and its thread."""
        self.pause()
        self.stopped.set()
        if self.seconds:
            # Or the thread might be the last to hold the process group when Python is gone.
            self.thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(min(self.seconds / 20, 1.0)):
            if time.monotonic() - self.since > self.limit:
                # Reporting takes time, in which the fault handler must not fire.
                faulthandler.cancel_dump_traceback_later()
                self._report()
                # Not sys.exit, which would end this thread only and run handlers that may hang.
                os._exit(EXIT_HUNG)

    def _report(self) -> None:
        """Write the stack to stderr and to the file.

        Each gets a thread and `REPORTING` seconds, because a full pipe or a dead file system may be
        what hangs.
        """
        stack = "".join(traceback.format_stack(sys._current_frames()[self.main]))
        seconds = time.monotonic() - self.since
        where = f"error: rank {self.world.rank} hangs: {self.doing}, for {seconds:.0f} s."
        text = f"{where} It stands at\n{stack}"
        writers: tuple[Callable[[], object], ...] = (
            lambda: print(text, file=sys.stderr, flush=True),
            lambda: self.file.write_text(text),
        )
        threads = [threading.Thread(target=write, daemon=True) for write in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(REPORTING)
