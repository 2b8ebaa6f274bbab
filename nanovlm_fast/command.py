"""What every command does alike: an error is one line on stderr and an exit code, and so is Ctrl-C.

Exit codes: 0 done, 1 an error, 2 a command line that makes no sense (argparse's), 70 a hang
(watchdog.py), 75 saved for a signal (signals.py), 130 Ctrl-C. An exception that nobody foresaw keeps
its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

INTERRUPTED = 130
USAGE = 2


class UsageError(Exception):
    """A command line that makes no sense."""


class Parser(argparse.ArgumentParser):
    """One whose errors `reports_errors` prints: a line, without the usage of thirty options before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def reports_errors(*more: type[Exception], code: int = 1) -> Callable[[Callable], Callable]:
    """Decorate a command's `main(argv)` so that what goes wrong is printed as one line.

    OSError, ValueError, `more` and lack of memory return `code`, a `Parser`'s errors USAGE. Ctrl-C
    returns INTERRUPTED; a command with more to say about it raises KeyboardInterrupt again, with that.
    """

    def decorate(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
        @functools.wraps(main)
        def reporting(argv: list[str] | None = None) -> int:
            try:
                if signal.getsignal(signal.SIGINT) is _leave:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                done = main(argv)
                sys.stdout.flush()  # a full disk behind it is an error of the command too
                return done
            except UsageError as error:
                return _fail(one_line(error), USAGE)
            except KeyboardInterrupt as stop:
                return _fail(one_line(stop) if str(stop) else "interrupted", INTERRUPTED)
            except (OSError, ValueError, *more) as error:
                return _fail(one_line(error), code)
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error):
                    raise
                return _fail(f"out of memory: {one_line(error)}", code)

        return reporting

    return decorate


def one_line(error: BaseException) -> str:
    """What the exception says, without line breaks; its type where it says nothing."""
    text = repr(error) if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the host's or the device's memory was too small."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "can't allocate memory" in str(error)  # PyTorch's on a CPU, which has no type of its own


def utf8(text: str) -> str:
    """The `type` of an option whose text a tokenizer reads.

    Bytes of a command line that are no UTF-8 arrive as surrogates, which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!a} is no UTF-8") from error
    return text


def end_on_interrupt(is_command: bool) -> None:
    """Make Ctrl-C one line while a command still imports torch, which takes seconds.

    `reports_errors` takes over from there. A SIGINT that the shell had ignored stays ignored.
    """
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def keeping_interrupts() -> Iterator[None]:
    """Processes started in here never hear Ctrl-C, which a terminal sends to all: this one decides."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_: object) -> None:
    os._exit(_fail("interrupted", INTERRUPTED))


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # or the interpreter would try again at its end, and complain
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
