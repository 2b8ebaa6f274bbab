"""A pytest plugin that writes one line of JSON per outcome, at once: a killed run leaves its log.

`bench.checks` loads it. It imports nothing of the project: a module imported here would be loaded
before the tests choose how kernels run.
"""

from __future__ import annotations

import json
import os


def pytest_runtest_logreport(report):
    # A test has three phases; setup and teardown only count where they do not pass.
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, report.longrepr, report.duration)


def pytest_collectreport(report):
    if report.outcome == "failed":
        _write(report.nodeid, "failed", report.longrepr, 0.0)


def _write(test, outcome, said, seconds):
    if "PYTEST_XDIST_WORKER" in os.environ:  # the main process receives the same report
        return
    crash = getattr(said, "reprcrash", None)
    text = said[2] if isinstance(said, tuple) else str(said or "")  # a skip: (file, line, reason)
    if crash:
        text = crash.message
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = ""
    if lines:  # the first line says what went wrong; in a traceback the last one does
        message = (lines[0] if crash or outcome == "skipped" else lines[-1])[:200]
    row = {"test": test, "outcome": outcome, "message": message, "seconds": seconds}
    with open(os.environ["PYTEST_LOG"], "a") as file:
        file.write(json.dumps(row) + "\n")
