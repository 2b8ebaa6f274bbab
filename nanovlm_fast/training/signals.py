"""Signals that ask a run to save and leave: a scheduler's SIGTERM or SIGUSR1, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time

# Exit code of a run that a signal ended: all is saved, and --auto-resume continues.
EXIT_SAVED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE = 5.0  # seconds after the first signal in which another one counts as the same


class Signals:
    """Remembers that a signal came, so that the loop can stop after its step.

    A second signal ends the process at once, but not within `PATIENCE` of the first: a scheduler's
    signal reaches a rank twice, from the scheduler itself and from torchrun.
    """

    def __init__(self) -> None:
        self.since: float | None = None

    @property
    def came(self) -> bool:
        return self.since is not None

    def listen(self) -> None:
        """Handle signals from here on."""
        for signum in SIGNALS:
            signal.signal(signum, self._note)

    def leave_at_once(self) -> None:
        """Exit as soon as a signal comes, or now if one came.

        Called when all is saved but the last evaluation, which --auto-resume repeats.
        """
        # The handlers before the check: a signal between the two would be lost.
        for signum in SIGNALS:
            signal.signal(signum, lambda *_: sys.exit(EXIT_SAVED))
        if self.came:
            sys.exit(EXIT_SAVED)

    def _note(self, signum: int, _frame: object) -> None:
        # Nothing else happens in a handler: the interrupted code may hold any lock.
        if self.since is None:
            self.since = time.monotonic()
        elif time.monotonic() - self.since > PATIENCE:
            # The default action, so that the exit status names the signal.
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
