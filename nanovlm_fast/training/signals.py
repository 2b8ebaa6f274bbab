"""Signals that ask a run to save and leave: a scheduler's SIGTERM or SIGUSR1, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time

EXIT_SAVED = 75  # exit code of a run that a signal ended: all is saved, --auto-resume goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE = 5.0  # seconds


class Signals:
    """Whether one came. Another one stops the process at once, but not within `PATIENCE` of the first.

    For a scheduler's reaches a rank twice, from it and from torchrun.
    """

    def __init__(self) -> None:
        self.since: float | None = None

    @property
    def came(self) -> bool:
        return self.since is not None

    def listen(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, self._note)

    def leave_at_once(self) -> None:
        """From here on all is saved but the last evaluation, which the same command with --auto-resume does again."""
        for signum in SIGNALS:
            signal.signal(signum, lambda *_: sys.exit(EXIT_SAVED))
        if self.came:
            sys.exit(EXIT_SAVED)

    def _note(self, signum: int, _frame: object) -> None:
        if self.since is None:
            self.since = time.monotonic()
        elif time.monotonic() - self.since > PATIENCE:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
