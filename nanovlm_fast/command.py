"""What all commands have in common: an error is one line on stderr and an exit code; so is Ctrl-C.

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | an error |
| 2 | a command line that makes no sense (argparse's code) |
| 70 | a hang (`training/watchdog.py`) |
| 75 | saved because of a signal (`training/signals.py`) |
| 130 | Ctrl-C |

An exception that is not foreseen is a bug, and keeps its traceback.
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

from nanovlm_fast import threads

INTERRUPTED = 130
USAGE = 2

Main = Callable[..., int]  # main(argv=None) -> exit code


class UsageError(Exception):
    """A command line that makes no sense."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors `reports_errors` prints: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def add_model_options(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Add the options that say which model a command loads and, with `device`, where it runs."""
    parser.add_argument(
        "--checkpoint",
        help="run (its newest checkpoint), RUN/best, folder, or hub name; default: the latest run",
    )
    parser.add_argument(
        "--lm-tokenizer", default="", help="hub name or folder; default: the checkpoint's own"
    )
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..., mps")


# In a plain RuntimeError of PyTorch on a CPU, of its compiler around another error, or of cuBLAS
MEMORY_IS_SHORT = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "cublasCreate")


def reports_errors(*more: type[Exception], code: int = 1) -> Callable[[Main], Main]:
    """Decorate a command's `main(argv)` so that errors are printed as one line.

    OSError, ValueError, the exceptions in `more` and a lack of memory return `code`; errors of a
    `Parser` return USAGE. Ctrl-C returns INTERRUPTED; a command with more to say about it raises
    KeyboardInterrupt again, with that text.
    """

    expected: tuple[type[Exception], ...] = (OSError, ValueError, *more)

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def reporting(argv: list[str] | None = None) -> int:
            try:
                # From here on Ctrl-C is an exception, so that the command can clean up.
                if signal.getsignal(signal.SIGINT) is _leave:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                done = main(argv)
                # Flushed here and not at exit: if stdout is a file on a full disk, that is an
                # error of the command too.
                sys.stdout.flush()
                return done
            except UsageError as error:
                return _fail(one_line(error), USAGE)
            except KeyboardInterrupt as stop:
                return _fail(one_line(stop) if str(stop) else "interrupted", INTERRUPTED)
            except expected as error:
                return _fail(one_line(error), code)
            except (MemoryError, RuntimeError) as error:
                if not ran_out_of_memory(error):
                    raise
                return _fail(f"out of memory: {one_line(error)}", code)

        return reporting

    return decorate


def one_line(error: BaseException) -> str:
    """Return the exception's message without line breaks, or its type if the message is empty."""
    # str() of a KeyError is only the key.
    text = repr(error) if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether the host's or the device's memory was too small."""
    # By name, since importing torch for its OutOfMemoryError would take seconds.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in MEMORY_IS_SHORT)


def utf8(text: str) -> str:
    """The `type` of an option whose text goes to a tokenizer.

    Bytes of a command line that are not UTF-8 arrive as surrogates, which no tokenizer accepts.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!a} is no UTF-8") from error
    return text


def begin(is_command: bool) -> None:
    """Prepare the process of a command, before it imports torch.

    Ctrl-C prints one line while torch is being imported, which takes seconds; `reports_errors`
    takes over afterwards. If SIGINT was ignored from the start, as by `nohup` or for jobs in the
    background, it stays ignored. `threads.begin` bounds how long threads spin. A program that
    merely imports a module of ours (`is_command` is false) is left alone.
    """
    if not is_command:
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    threads.begin()


@contextlib.contextmanager
def keeping_interrupts() -> Iterator[None]:
    """Make processes that are started inside ignore Ctrl-C.

    A terminal sends it to all processes of a command, but only this one should decide how to end.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_: object) -> None:
    # Not sys.exit: an exception in the middle of an import can be caught and lost there.
    os._exit(_fail("interrupted", INTERRUPTED))


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        # stdout cannot be written. The interpreter would try again at exit and print a traceback,
        # so what is left goes to the null device.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
