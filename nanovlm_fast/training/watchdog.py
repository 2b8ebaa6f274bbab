"""Says where a rank hangs, and ends it, so that torchrun can start again from the last checkpoint."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from nanovlm_fast.ranks import World

EXIT_HUNG = 70  # exit code
REPORTING = 3.0


class Watchdog:
    """Reports the stack of this process when `beat` was not heard for `seconds`, and exits with EXIT_HUNG.

    The report goes to stderr and to RUN/hang-rank<r>.txt. Ranks that wait for a hung one hang too; they grant it a
    tenth more time to report first. Where not even Python runs any more (a call that holds its lock), the interpreter's
    own fault handler writes the stack to stderr after twice the time and exits with 1. 0 seconds: never.
    """

    def __init__(self, seconds: float, run: Path, world: World):
        self.seconds, self.file, self.world = seconds, run / f"hang-rank{world.rank}.txt", world
        self.main, self.stopped = threading.get_ident(), threading.Event()
        self.beat("starting")
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        if seconds:
            self.thread.start()

    def beat(self, doing: str, waiting: bool = False) -> None:
        """This process lives and is now `doing` that; `waiting` for other ranks, if so."""
        self.doing, self.since = doing, time.monotonic()
        self.limit = self.seconds * (1.1 if waiting else 1.0)
        if self.seconds:
            faulthandler.dump_traceback_later(2 * self.limit, exit=True)

    def pause(self) -> None:
        """What comes may take as long as it likes: data and weights from far away, compiling."""
        self.beat("paused")
        self.limit = float("inf")
        faulthandler.cancel_dump_traceback_later()

    def evaluating(self) -> None:
        """The first rank's beat while it evaluates, which the others hear in `evaluated`."""
        self.beat("evaluating")
        self.world.sum([1])

    def evaluated(self) -> None:
        """The first rank has evaluated; the others wait here until it has."""
        going_on = 1.0
        while going_on:
            self.beat("waiting for the first rank's evaluation", waiting=True)
            (going_on,) = self.world.sum([0])

    def stop(self) -> None:
        self.pause()
        self.stopped.set()
        if self.seconds:
            self.thread.join()  # or it might be the last to hold the ranks' group, when Python is gone already

    def _watch(self) -> None:
        while not self.stopped.wait(min(self.seconds / 20, 1.0)):
            if time.monotonic() - self.since > self.limit:
                faulthandler.cancel_dump_traceback_later()
                self._report()
                os._exit(EXIT_HUNG)

    def _report(self) -> None:
        """Each place has a thread and `REPORTING` seconds: it may be what hangs."""
        stack = "".join(traceback.format_stack(sys._current_frames()[self.main]))
        seconds = time.monotonic() - self.since
        text = f"error: rank {self.world.rank} hangs: {self.doing}, for {seconds:.0f} s. It stands at\n"
        text += stack
        places = (
            lambda: print(text, file=sys.stderr, flush=True),
            lambda: self.file.write_text(text),
        )
        threads = [threading.Thread(target=write, daemon=True) for write in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(REPORTING)
