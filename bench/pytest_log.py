"""A pytest plugin: a line of JSON for every outcome, written as it comes, so that a run that is killed leaves its own.

`bench.checks` loads it. It imports nothing: what it imported would be there before the tests choose how kernels run.
"""

import json
import os


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, report.longrepr, report.duration)


def pytest_collectreport(report):
    if report.outcome == "failed":
        _write(report.nodeid, "failed", report.longrepr, 0.0)


def _write(test, outcome, said, seconds):
    if "PYTEST_XDIST_WORKER" in os.environ:  # the process that started the workers hears it too
        return
    crash = getattr(said, "reprcrash", None)
    lines = (crash.message if crash else said[2] if isinstance(said, tuple) else str(said or "")).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    said = (lines[0] if crash or outcome == "skipped" else lines[-1])[:200] if lines else ""
    with open(os.environ["PYTEST_LOG"], "a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "message": said, "seconds": seconds}) + "\n")
