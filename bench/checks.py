"""The tests that need a GPU, as a result file: counts, failures, and which kernels are red.

    python -m bench.checks                       pytest -m "gpu and not slow"
    python -m bench.checks -- tests/kernels      options and files after -- go to pytest
    python -m bench.checks --quick               one file: a rehearsal

A kernel is red if one of its tests failed. bench.kernels does not time a red kernel on the same
device and commit; everything else is still measured. Exit code 1 if a test failed, or if pytest was
stopped or died before its end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.harness.options import split_options
from bench.harness.results import ROOT, facts, place, read, write
from bench.harness.tables import Rows
from bench.subjects.operators import ALL
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device
from nanovlm_fast.ranges import Range

HERE = ROOT.parent.parent
OUTCOMES = ("passed", "failed", "skipped")
QUICK = "tests/model/test_attention.py"
GRACE = 10.0  # seconds that pytest has to end after it was interrupted
INTERRUPTED = 2  # the exit code of pytest after Ctrl-C


def run(options: list[str], limit: float, processes: int = 1) -> tuple[int, dict]:
    """Run pytest for at most `limit` seconds; return its exit code and the outcome of the tests.

    Several `processes` need pytest-xdist; where it is not installed, one runs all tests.
    """
    call = [sys.executable, "-m", "pytest", "-v", "-p", "bench.harness.pytest_log"]
    # Not the defaults of pyproject.toml: pytest-xdist may not be installed beside a GPU.
    call += ["-o", "addopts="]
    call += ["-m", "gpu and not slow", "--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout"):
        call += ["--timeout", "120"]
    if processes > 1 and importlib.util.find_spec("xdist"):
        call += ["-n", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTEST_LOG": str(log), "PYTHONPATH": paths}
        # Set if this runs inside a worker of pytest-xdist; the log would then stay empty.
        env.pop("PYTEST_XDIST_WORKER", None)
        # Each process compiles hundreds of kernel variants; more threads for each would only
        # compete for the cores.
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
        process = subprocess.Popen([*call, *options], cwd=HERE, env=env)
        try:
            code = process.wait(limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            process.send_signal(signal.SIGINT)
            # SIGINT lets pytest end the test and report; a kernel that hangs needs SIGKILL.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            if isinstance(stop, KeyboardInterrupt):  # a part of the tests is no result
                raise
            code = INTERRUPTED
        return code, counted(log.read_text().splitlines() if log.exists() else [])


def counted(lines: list[str]) -> dict:
    """The content of the result file from the lines of bench/harness/pytest_log.py.

    A test that was stopped before its end is in none of the counts.
    """
    cases: dict[str, dict] = {}
    for case in map(json.loads, lines):
        # A failure is kept: the teardown may fail after the test itself has passed, or pass after.
        if cases.get(case["test"], {}).get("outcome") != "failed":
            cases[case["test"]] = case
    by_outcome = {
        outcome: [c for c in cases.values() if c["outcome"] == outcome] for outcome in OUTCOMES
    }
    failures = [{"test": case["test"], "message": case["message"]} for case in by_outcome["failed"]]
    files = {Path(failure["test"].split("::")[0]).stem for failure in failures}
    red = [kernel.name for kernel in ALL if f"test_{kernel.name}" in files]
    slowest = sorted(cases.values(), key=lambda case: -case["seconds"])[:10]
    counts = {outcome: len(some) for outcome, some in by_outcome.items()}
    rows = [[case["test"], round(case["seconds"], 2)] for case in slowest]
    return {**counts, "failures": failures, "red": red, "slowest": rows}


def red_kernels(device: torch.device, out: Path | None) -> set[str]:
    """Kernels whose tests failed on this device at this commit, as far as a result file says so."""
    file = place("tests", device, out)
    if not file.exists():
        return set()
    result = read(file)
    if result.get("commit") != facts(device)["commit"]:
        return set()  # it was about other code
    return set(result.get("red", ()))


def check_rows(result: dict) -> Rows:
    """The table of bench/README.md."""
    counts = tuple(f"{result[outcome]:,}" for outcome in OUTCOMES)
    rows: Rows = [("tests", "passed", "failed", "skipped"), ("all", *counts)]
    return rows + [
        (failure["test"], "-", failure["message"] or "failed", "-")
        for failure in result["failures"]
    ]


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.checks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--limit",
        type=Range(float, above=0, most=1e9),
        default=600.0,
        help="seconds until pytest is stopped",
    )
    parser.add_argument(
        "--processes",
        type=Range(int, least=1),
        default=1,
        help="that share the tests, where pytest-xdist is installed",
    )
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK}: a rehearsal")
    parser.add_argument(
        "--device", default="auto", help="where the result file belongs; pytest finds its own"
    )
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    own, handed_on = split_options(argv)
    args = make_parser().parse_args(own)
    device = pick_device(args.device)
    options = [*handed_on, *[QUICK] * args.quick]
    code, found = run(options, args.limit, args.processes)
    file = write("tests", device, {"exit_code": code, **found}, args.out)
    print(f"written: {file}")
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**found), end="")
    print(f"; red kernels: {', '.join(found['red'])}" if found["red"] else "")
    # On a GPU a run that skipped every test proves nothing, so it does not succeed either.
    all_skipped = device.type == "cuda" and not found["passed"]
    return int(code != 0 or all_skipped)


if __name__ == "__main__":
    sys.exit(main())
