"""Who is faster, and by how much: every suite that fits this machine, one after the other.

    python -m bench                              at most 10 minutes, to bench/results/<device>
    python -m bench --quick                      about a minute, to runs/bench: does everything run?
    python -m bench --only kernels,train_step    selected suites; the only way to run race
    python -m bench.report                       afterwards: tables and plots from the result files

Each suite runs in its own process with a time limit. A suite that dies, or takes the device with
it, does not affect the others, and the results that exist are kept. A suite that does not fit this
machine says why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bench import suites
from bench.harness.results import ROOT, place, read
from bench.harness.tables import Rows, lined_up
from bench.suites import Suite
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device

TOTAL = 600.0  # seconds for all suites together
HERE = ROOT.parent.parent
QUICK_OUT = HERE / "runs" / "bench"  # the result of a quick run is not worth keeping


@dataclass
class Outcome:
    """A line of the summary: how a suite ended. `seconds` is None if it did not run."""

    suite: Suite
    ending: str
    seconds: float | None = None
    failed: bool = False
    files: tuple[Path, ...] = ()


def misfit(suite: Suite, quick: bool, on_gpu: bool) -> str | None:
    """Why the suite cannot run here; None if it can."""
    if importlib.util.find_spec(suite.module) is None:
        return "not here: this version has no such suite"
    if quick and not suite.in_quick:
        return "too long for --quick"
    for need in suite.quick_needs if quick else suite.needs:
        if need == "gpu" and not on_gpu:
            return "needs a GPU"
        if need == "cpu" and on_gpu:
            return "for machines without a GPU"
        if need not in ("gpu", "cpu") and importlib.util.find_spec(need) is None:
            return f"needs the package {need}"
    return None


def command(suite: Suite, quick: bool, device: str, out: Path) -> list[str]:
    """The command that runs a suite and writes its result below `out`."""
    options = suite.quick if quick else suite.gpu if device.startswith("cuda") else suite.full
    call = [sys.executable, "-m", suite.module, *options]
    if not suite.anywhere:
        call += ["--device", device]
    if out != ROOT:
        # Relative where possible: result files record the command, and should not name this
        # machine.
        call += ["--out", str(out.relative_to(HERE) if out.is_relative_to(HERE) else out)]
    return call


def run(
    suite: Suite, call: list[str], limit: float, out: Path, tick: Callable[[float], None]
) -> Outcome:
    """Run the suite's process for at most `limit` seconds and print its output.

    `tick` is called with the elapsed seconds, several times per second.
    """
    before = stamps(out)
    start = time.monotonic()
    # A new session makes the suite the leader of a process group, which `end` kills as a whole.
    process = subprocess.Popen(
        call,
        start_new_session=True,
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while True:
            try:
                printed, errors = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                tick(time.monotonic() - start)
                if time.monotonic() - start > limit:
                    end(process)
                    printed, errors = process.communicate()
                    break
    except BaseException:  # Ctrl-C too: the suite must not outlive this process
        end(process)
        raise
    seconds = time.monotonic() - start
    files = tuple(file for file, stamp in stamps(out).items() if before.get(file) != stamp)
    tqdm.write(printed.rstrip())
    if seconds > limit:
        late = f"stopped after {seconds:.0f} s, its limit"
        return Outcome(suite, late, seconds, True, files)
    ending = ending_of(process.returncode, errors, files)
    return Outcome(suite, ending, seconds, process.returncode != 0, files)


def ending_of(code: int, errors: str, files: tuple[Path, ...]) -> str:
    """How a suite ended that was not stopped: its error, or what its results say."""
    if code:
        # The last line of a traceback or of an error message says what went wrong.
        last = [line for line in errors.splitlines() if line.strip()] or [f"exit code {code}"]
        return f"failed: {last[-1].strip()[:200]}"
    return "; ".join(["ran", *(note for file in files for note in notes(file))])


def notes(file: Path) -> Iterator[str]:
    """What a reader of the summary must know about a result."""
    try:
        result = read(file)
    except (OSError, ValueError) as error:
        yield str(error)
        return
    if result.get("small"):
        yield "rehearsed, not timed"
    elif isinstance(result.get("speedup"), float):
        yield f"{result['speedup']:.1f}x"
    yield from result.get("machine", {}).get("warnings", ())


def stamps(out: Path) -> dict[Path, int]:
    """The result files below `out`, with the times they were written."""
    return {file: file.stat().st_mtime_ns for file in sorted(out.glob("*/*.json"))}


def end(process: subprocess.Popen) -> None:
    """Kill the suite and every process that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_all(
    suites: list[Suite], quick: bool, device: str, out: Path, outcomes: list[Outcome]
) -> None:
    """Run every suite that fits, one after the other; `outcomes` grows as they finish."""
    expected = {s.name: s.expected(quick) for s in suites}
    why = {s.name: misfit(s, quick, device.startswith("cuda")) for s in suites}
    total = sum(expected[s.name] for s in suites if not why[s.name])
    started = time.monotonic()
    count = sum(not reason for reason in why.values())
    suites_fit = "1 suite" if count == 1 else f"{count} suites"
    print(f"{suites_fit} on {device}, about {total / 60:.1f} min; results go to {out}")
    form = "{desc} |{bar}| {elapsed}<{remaining}"
    with tqdm(total=total, disable=None, leave=False, bar_format=form) as bar:
        done = 0.0

        def tick(seconds: float) -> None:
            # A suite that takes longer than expected must not run into the next one's share.
            bar.n = done + min(seconds, expected[suite.name])
            bar.refresh()

        for suite in suites:
            left = TOTAL - (time.monotonic() - started)
            if why[suite.name] or left < 5:
                reason = why[suite.name] or f"not run: {TOTAL / 60:.0f} minutes are over"
                outcomes.append(Outcome(suite, reason))
                continue
            bar.set_description(suite.name)
            tqdm.write(f"\n== {suite.name}: {suite.about}")
            limit = min(suite.limit(quick), left)
            outcomes.append(run(suite, command(suite, quick, device, out), limit, out, tick))
            tqdm.write(outcomes[-1].ending)
            done += expected[suite.name]


def outcome_table(outcomes: list[Outcome], out: Path) -> str:
    """Every suite with its seconds, how it ended and the files that it wrote."""
    rows: Rows = [("suite", "seconds", "how it ended")]
    for outcome in outcomes:
        seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.0f}"
        rows.append((outcome.suite.name, seconds, outcome.ending))
        rows += [("", "", f"  {file.relative_to(out)}") for file in outcome.files]
    return f"\n{lined_up(rows, left=(0, 2))}"


def chosen(only: str) -> list[Suite]:
    """The suites of an --only option; raises ValueError for an unknown name."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {suite.name: suite for suite in suites.SUITES if not suite.by_hand}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only {','.join(unknown)}: there are {', '.join(known)}")
    return [suite for suite in known.values() if suite.name in names or not (names or suite.alone)]


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy sizes: about a minute in all")
    parser.add_argument("--only", default="", help="suites, separated by commas")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--out", type=Path, help="folder of results (default: bench/results; quick: runs/bench)"
    )
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    out = (args.out or (QUICK_OUT if args.quick else ROOT)).resolve()
    outcomes: list[Outcome] = []
    # SIGTERM as Ctrl-C: without that the suite's process would outlive this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    suites = chosen(args.only)
    device = pick_device(args.device)
    out.mkdir(parents=True, exist_ok=True)
    for file in place("", device, out).parent.glob("*.json"):
        read(file)  # refuses early: a result could not be written beside files it cannot read
    try:
        run_all(suites, args.quick, str(device), out, outcomes)
    except KeyboardInterrupt:
        print(outcome_table(outcomes, out))
        raise KeyboardInterrupt("stopped; the results above stay") from None
    print(outcome_table(outcomes, out))
    if not args.quick and out == ROOT:
        print("python -m bench.report writes these results into the tables")
    none_ran = all(outcome.seconds is None for outcome in outcomes)
    return int(none_ran or any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
