"""A process that answers questions, and may hang or die over one.

An illegal access poisons a CUDA context for good, and a kernel that hangs cannot be stopped from
within. So a candidate runs in another process first.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovlm_fast.command import keeping_interrupts

START_LIMIT = 120.0  # seconds until a process is ready: it imports torch
END_LIMIT = 10.0  # seconds until a process that was killed is gone


class Launcher:
    """Questions to a process, each a JSON object on a line, and so is each answer.

    The process gets `first` as its first line, and writes a line when it is ready. One that hung or
    died is replaced by the next question. Closing it, as the end of a `with` does, ends it.
    """

    def __init__(
        self,
        code: str,
        first: dict[str, Any],
        environment: Mapping[str, str | None] | None = None,
        start_limit: float = START_LIMIT,
    ):
        self.command = [sys.executable, "-c", code]
        self.first = first
        self.start_limit = start_limit
        self.environment = environment_with(environment or {})
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, question: dict[str, Any], limit: float) -> tuple[dict[str, Any], str | None]:
        """The answer, and None; or nothing, and why there is no answer within `limit` seconds."""
        if self.process is None:
            self._start()
            # Importing torch is no part of an answer: what hangs is seen as soon as it should be.
            _, silent = self._next_line(self.start_limit)
            if silent:
                return {}, silent
        with contextlib.suppress(OSError):  # it may be dead: then there is no answer either
            self._write(question)
        return self._next_line(limit)

    def _next_line(self, limit: float) -> tuple[dict[str, Any], str | None]:
        """The next line of the process, or why there is none; then it is ended."""
        try:
            line = self._read(time.monotonic() + limit)
        except TimeoutError:
            self.close()
            return {}, f"no answer within {limit:.0f} s"
        try:
            return json.loads(line), None
        except ValueError:
            return {}, self._obituary()

    def close(self) -> None:
        """End the process, and whatever it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # One that waits in a driver is not gone until the driver answers, which may be never.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_LIMIT)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self.errors.close()
        self.process = None

    def _start(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self.rest = b""  # of what was read: a line that is not complete
        # A session of its own, so that what it starts ends with it; Ctrl-C is for this process.
        with keeping_signals():
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env=self.environment,
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # `_read` finds out why
            self._write(self.first)

    def _write(self, values: dict[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(values).encode() + b"\n")
        self.process.stdin.flush()

    def _read(self, deadline: float) -> bytes:
        """The next line; what is left of one if the process ends. Raises TimeoutError."""
        assert self.process is not None and self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
            part = os.read(pipe, 65536)
            if not part:
                return b""
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _obituary(self) -> str:
        """How the process ended, and its last words."""
        assert self.process is not None
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = 0
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        words = f": {said[-1].strip()[:200]}" if said else ""
        self.close()
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"died of {signal.Signals(-code).name}{words}"
        return f"ended with {code}{words}"


def keeping_signals() -> contextlib.AbstractContextManager[None]:
    """`keeping_interrupts`, in the main thread, where alone signals can be set."""
    alone = threading.current_thread() is threading.main_thread()
    return keeping_interrupts() if alone else contextlib.nullcontext()


def environment_with(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment with changes (None: unset), in which this package is found."""
    values: dict[str, str | None] = {**os.environ, **changes}
    root = str(Path(__file__).resolve().parents[2])
    values["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {name: value for name, value in values.items() if value is not None}
