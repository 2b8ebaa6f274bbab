"""Command lines of suites that hand options on to another program."""

from __future__ import annotations

import sys


def split_options(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """The suite's own options, and those after `--`, which go to what it runs.

    None stands for this process's command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--" not in argv:
        return argv, []
    split = argv.index("--")
    return argv[:split], argv[split + 1 :]
