"""Runs the stages of bench/gpu_all.sh, one after the other, in what time there is.

    python -m bench.harness.stages --quick --device cpu

Nothing in here needs torch, so that a stage is started, stopped and logged whatever state the
device is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bench.harness.commit import UNKNOWN, VARIABLE, commit
from bench.suites import STAGES, Suite
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.ranges import Range

HERE = Path(__file__).resolve().parent.parent.parent
CONTINUES = 75  # EX_TEMPFAIL, the exit code of a suite whose own time was up
QUICK_LEAST = 20.0  # seconds without which no stage of a rehearsal is started
WRITING = 30.0  # seconds before its end at which a stage that has its own limit stops
GRACE = 15.0  # seconds that a stage has to end after SIGINT
OUT = "bench/results"
QUICK_OUT = "runs/gpu_all"  # the results of a rehearsal are not worth keeping


@dataclass
class Ended:
    """How a stage ended. `code` is None if it was stopped because its time was up."""

    code: int | None
    seconds: float


def allowance(limit: float, leasts: Sequence[float], left: float) -> float:
    """Seconds for the first of the stages that are to run; 0 if it is not worth starting.

    `leasts` are the seconds without which each of them is not started, the first one's first, and
    `left` is all there is. The first gets what is left, at most `limit`, but for the least times of
    the others: those that still fit, in their order, each with the grace that stopping the stage
    before it may take.
    """
    first, *others = leasts
    if left < first:
        return 0.0
    spare = left - first
    for least in others:
        if least + GRACE <= spare:
            spare -= least + GRACE
    return min(limit, first + spare)


def least_of(suite: Suite, quick: bool) -> float:
    """Seconds without which the stage is not started."""
    assert suite.stage is not None
    return QUICK_LEAST if quick else suite.stage.least


def command(suite: Suite, quick: bool, device: str, out: str, seconds: float) -> list[str]:
    """The command of a stage that may take `seconds`."""
    stage = suite.stage
    assert stage is not None
    if stage.script:
        return ["true"] if quick else ["bash", *stage.script]
    # The python of the whole call: sys.executable may be another one where a wrapper was given.
    python = os.environ.get("PYTHON", sys.executable)
    call = [python, "-m", "bench", "--only", suite.name, *["--quick"] * quick]
    if stage.options:
        own = f"{max(seconds - WRITING, 1):.0f}"
        options = stage.quick if quick else stage.options
        call = [python, "-m", suite.module]
        call += [own if option == "{seconds}" else option for option in options]
    return [*call, "--device", device, "--out", out]


def run(call: list[str], log: Path, seconds: float) -> Ended:
    """Run a command for at most `seconds`; its output goes to `log`."""
    start = time.monotonic()
    with log.open("wb") as file:
        # The leader of a process group, so that all that the stage has started is stopped with it.
        process = subprocess.Popen(
            call,
            cwd=HERE,
            stdin=subprocess.DEVNULL,  # or a stage that reads would be stopped by the terminal
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
        except BaseException:  # Ctrl-C: the stage must not outlive this process
            stop(process)
            raise
    return Ended(code, time.monotonic() - start)


def stop(process: subprocess.Popen) -> None:
    """End the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        # SIGINT first: Python can then write what it has. A process on a hung device needs SIGKILL.
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1].strip() if lines else ""


class Session:
    """One call: which stages are to run, and how those that ran have ended."""

    def __init__(self, out: str, device: str, quick: bool, budget: float):
        self.out = out
        self.device = device
        self.quick = quick
        self.ends = time.monotonic() + budget
        self.logs = HERE / out / "logs"
        # What a stage is done for: a rehearsal, or another commit or device, spares no work here.
        self.subject = json.dumps({"commit": commit(), "device": device, "quick": quick})
        self.unfinished: list[str] = []
        self.failed: list[str] = []

    def run_all(self, stages: list[Suite], again: bool) -> None:
        """Run the stages in turn; those that were done in an earlier call only `again`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        left = []
        for suite in stages:
            if not again and self.was_done(suite):
                say(f"== {suite.name}: done before")
            else:
                left.append(suite)
        while left:
            self.run_first(left)
            left = left[1:]

    def done(self, suite: Suite) -> Path:
        """The file that says on what the stage is done."""
        return self.logs / f"{suite.name}.done"

    def was_done(self, suite: Suite) -> bool:
        """Whether an earlier call has done the stage on this commit and device, as now."""
        done = self.done(suite)
        return done.exists() and done.read_text() == self.subject

    def run_first(self, stages: list[Suite]) -> None:
        """Run the first of the stages that are left, if there is time for it."""
        suite = stages[0]
        leasts = [least_of(stage, self.quick) for stage in stages]
        limit = suite.stage_limit()
        seconds = allowance(limit, leasts, self.ends - time.monotonic())
        if not seconds:
            say(f"== {suite.name}: no time left")
            self.unfinished.append(suite.name)
            return
        call = command(suite, self.quick, self.device, self.out, seconds)
        say(f"== {suite.name}: {' '.join(call)}")
        log = self.logs / f"{suite.name}.log"
        ended = run(call, log, seconds)
        said = f"{ended.seconds:.0f} s: {last_line(log)}"
        if ended.code == 0:
            self.done(suite).write_text(self.subject)
            say(f"   ok, {said}")
        elif ended.code == CONTINUES:
            self.unfinished.append(suite.name)
            say(f"   continues in the next call, {said}")
        elif ended.code is None and seconds < limit:
            # It had less than a stage may take, because others need time too.
            self.unfinished.append(suite.name)
            say(f"   stopped to leave time for others, {said}")
        else:
            self.failed.append(suite.name)
            say(f"   FAILED after {said} (see {log})")


def say(line: str) -> None:
    print(line, flush=True)


def chosen(names: str, error: Callable[[str], NoReturn]) -> list[Suite]:
    """The stages of a --stages option, in its order; an unknown name is an `error`."""
    wanted = [name for name in names.split(",") if name]
    for name in wanted:
        if name not in STAGES:
            error(f"no stage {name}; there are {', '.join(STAGES)}")
    return [STAGES[name] for name in wanted]


def check_device(device: str, error: Callable[[str], NoReturn]) -> None:
    """Call `error` for what no stage can take.

    Raises ValueError where the results of a GPU would not say which commit they are of.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        error(f"--device {device}: must be auto, cpu, cuda or cuda:N")
    if device != "cpu" and commit() == UNKNOWN:
        raise ValueError(
            f"this tree has no git history: set {VARIABLE} to its commit, "
            "or no result can be traced to its code"
        )


def make_parser() -> Parser:
    parser = Parser(
        prog="bench/gpu_all.sh", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    where = f"folder of results and logs (default: {OUT}; quick: {QUICK_OUT})"
    parser.add_argument("--out", help=where)
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--device", default="cuda")
    seconds = Range(float, above=0)
    # The whole call stays below ten minutes.
    parser.add_argument("--seconds", type=seconds, default=570.0, help="for the whole call")
    parser.add_argument("--quick", action="store_true", help="a rehearsal at toy sizes")
    parser.add_argument("--again", action="store_true", help="also what an earlier call has done")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    # SIGTERM as Ctrl-C: without that the stage would outlive this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # All names before the first stage runs: a misspelt one must not be noticed minutes later.
    stages = chosen(args.stages, parser.error)
    check_device(args.device, parser.error)
    out = args.out or (QUICK_OUT if args.quick else OUT)
    session = Session(out, args.device, args.quick, args.seconds)
    session.run_all(stages, args.again)
    if session.unfinished:
        names = " ".join(session.unfinished)
        print(f"not finished, the next call continues: {names}", file=sys.stderr)
    if session.failed:
        print(f"failed: {' '.join(session.failed)}", file=sys.stderr)
    return int(bool(session.unfinished or session.failed))


if __name__ == "__main__":
    sys.exit(main())
