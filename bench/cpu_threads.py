"""How the waiting of OpenMP's threads costs and helps on a CPU, idle and beside other processes.

    python -m bench.cpu_threads                          training, every setting
    python -m bench.cpu_threads --measure evaluate,generate,prepare --settings unset,ours,passive

PyTorch's threads meet at the end of every operator. A thread that arrives first spins for a while
before it sleeps. On idle cores spinning saves the wake-up. Where another process has a core, it
burns the time that the late thread needs. Each cell of the table is the real command in a process
of its own; settings take turns within a round, so that drift is spread over them. `busy` processes
do nothing but compute. The result file is written after each round.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.train_run import TRAIN
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device
from nanovlm_fast.ranges import Range
from nanovlm_fast.reporting.metrics import read_metrics
from nanovlm_fast.threads import OPENMP, cores_of

OPENMP_NAMES = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
MEASURES = ("train", "evaluate", "generate", "prepare")
START_LIMIT = 120.0  # seconds until train.py must have logged its first line


@dataclass(frozen=True)
class Setting:
    """Environment variables of OpenMP, and options of train.py."""

    environment: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()


def spin(count: int) -> Setting:
    return Setting((("GOMP_SPINCOUNT", str(count)),))


# What GNU OpenMP does where nothing is set: about 3 ms. It is written out here, because our
# commands leave a variable that is set as it is.
UNSET = 300_000
OURS = tuple(OPENMP.items())
ONE_THREAD = (("OMP_NUM_THREADS", "1"),)
COMPILED = ("--compile", "default")
SETTINGS = {
    "unset": spin(UNSET),
    "ours": Setting(OURS),
    "spin-0": spin(0),
    "spin-300": spin(300),
    "spin-1000": spin(1_000),
    "spin-3000": spin(3_000),
    "spin-10000": spin(10_000),
    "spin-30000": spin(30_000),
    "spin-100000": spin(100_000),
    "passive": Setting((("OMP_WAIT_POLICY", "passive"),)),
    "one-thread": Setting(ONE_THREAD),
    "unset-compiled": Setting(spin(UNSET).environment, COMPILED),
    "ours-compiled": Setting(OURS, COMPILED),
    "one-thread-compiled": Setting(ONE_THREAD, COMPILED),
    "ours-no-worker": Setting(OURS, ("--workers", "0")),
}


def environment(setting: Setting) -> dict[str, str]:
    """This process's environment, with only the setting's variables of OpenMP."""
    own = {name: value for name, value in os.environ.items() if name not in OPENMP_NAMES}
    return {**own, **dict(setting.environment)}


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """`count` processes that compute without end, until the block ends."""
    # They end with this process, however it ends.
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    spinning = [sys.executable, "-c", code]
    processes = [subprocess.Popen(spinning) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def training_rate(setting: Setting, options: list[str], seconds: float) -> float:
    """Tokens per second of train.py over `seconds`, counted from its first logged line on.

    A run that stands still counts with the time in which it stands still. Raises RuntimeError if
    the run ends early or does not log within START_LIMIT.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        # No curriculum: its first part has nearly empty batches, and a fast setting leaves it early
        command = [sys.executable, str(TRAIN), "--out", str(run), "--curriculum", ""]
        command += ["--log-every", "1", *options, *setting.options]
        # A session of its own, so that the loader's workers end with it.
        process = subprocess.Popen(
            command,
            env=environment(setting),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            began = wait_for_first_line(process, run)
            time.sleep(max(0.0, began + seconds - time.perf_counter()))
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended after {process.returncode}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        took = time.perf_counter() - began
        lines = [line for line in read_metrics(run) if "tokens_per_s" in line]
    return rate_of(lines, took)


def rate_of(lines: list[dict], took: float) -> float:
    """Tokens per second from the first line on, which was written `took` seconds ago.

    What was trained after the last line is in none, so the time ends with that line; unless the run
    has stood still for longer than two steps take.
    """
    if len(lines) < 2:
        return 0.0
    tokens = 0.0
    for before, line in itertools.pairwise(lines):
        tokens += line["tokens_per_s"] * (line["seconds"] - before["seconds"])
    seen = lines[-1]["seconds"] - lines[0]["seconds"]
    between = seen / (len(lines) - 1)
    return tokens / (seen if took - seen <= 2 * between else took)


def wait_for_first_line(process: subprocess.Popen, run: Path) -> float:
    """The time (of `perf_counter`) at which train.py wrote its first line of metrics."""
    began = time.perf_counter()
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        waited = time.perf_counter() - began
        if process.poll() is not None or waited > START_LIMIT:
            raise RuntimeError(f"train.py logged nothing in {waited:.0f} s")
        time.sleep(0.02)
    return time.perf_counter()


def command_seconds(name: str, setting: Setting, run: Path, folder: Path) -> float:
    """Seconds that a whole command takes, its start included; `run` is a trained checkpoint.

    Raises RuntimeError if it fails.
    """
    module = {"prepare": "data.prepare"}.get(name, name)
    command = [sys.executable, "-m", f"nanovlm_fast.{module}"]
    if name == "prepare":
        command += ["--out", str(folder / "shards")]
    elif name == "generate":
        command += ["--checkpoint", str(run), "--prompt", "what is it", "--max-new-tokens", "400"]
    else:
        command += ["--checkpoint", str(run), "--data", "easy_vqa"]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment(setting), capture_output=True, cwd=TRAIN.parent)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{' '.join(command)} failed: {' '.join(last)}")
    return time.perf_counter() - began


def measured(name: str, setting: Setting, run: Path, options: list[str], seconds: float) -> float:
    """One reading: tokens/s of training, seconds of another command."""
    if name == "train":
        return training_rate(setting, options, seconds)
    with tempfile.TemporaryDirectory() as folder:
        return command_seconds(name, setting, run, Path(folder))


def train_briefly(run: Path, options: list[str]) -> None:
    """A checkpoint for `evaluate` and `generate`."""
    command = [sys.executable, str(TRAIN), "--out", str(run), "--max-steps", "5", *options]
    subprocess.run([*command, "--no-final-eval"], check=True, capture_output=True)


def compare(
    names: list[str],
    settings: dict[str, Setting],
    busy: list[int],
    rounds: int,
    seconds: float,
    name: str,
    out: Path | None,
) -> dict:
    """Every setting under every load, `rounds` times; written to the result file as it grows."""
    device = pick_device("cpu")
    options = ["--device", "cpu"]
    readings: dict = {}
    result: dict = {"cores": cores_of(), "seconds_per_reading": seconds}
    result["settings"] = {name: dict(setting.environment) for name, setting in settings.items()}
    cells = [(measure, load, setting) for measure in names for load in busy for setting in settings]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if set(names) - {"train"}:
            train_briefly(run, options)
        for _ in tqdm(range(rounds), desc="rounds"):
            for measure, load, setting in tqdm(cells, desc="readings", leave=False):
                rows = readings.setdefault(measure, {}).setdefault(f"{load} busy", {})
                with busy_processes(load):
                    value = measured(measure, settings[setting], run, options, seconds)
                rows.setdefault(setting, []).append(value)
            # Rotated, so that no setting is always measured first
            cells = cells[1:] + cells[:1]
            result["readings"] = readings
            write(name, device, result, out)
    return result


def cpu_threads_rows(result: dict) -> Rows:
    """Medians, a row per setting: tokens/s of training, seconds of the other commands."""
    names = result["readings"]
    loads = list(next(iter(names.values())))
    idle = "no other process"
    heads = (idle if load == "0 busy" else f"{load.split()[0]} busy beside it" for load in loads)
    rows: Rows = [("command, setting", "unit", *heads)]
    for name, by_load in names.items():
        unit, form = ("tokens/s", ",.0f") if name == "train" else ("s", ".1f")
        for setting in by_load[loads[0]]:
            medians = (statistics.median(by_load[load][setting]) for load in loads)
            rows.append((f"{name}, {setting}", unit, *(format(m, form) for m in medians)))
    return rows


def names_of(text: str, known: tuple[str, ...], option: str) -> list[str]:
    """The comma-separated names of an option. Raises ValueError if one is unknown."""
    names = text.split(",") if text else list(known)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{option} names {twice[0]} twice")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option} {unknown[0]}: there are {', '.join(known)}")
    return names


def busy(text: str) -> list[int]:
    """The `type` of --busy, such as "0,1,2". Each process takes a core: 10**20 would take all."""
    return [Range(int, most=256)(count) for count in text.split(",")]


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.cpu_threads", description=__doc__.splitlines()[0])
    parser.add_argument("--measure", default="train", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--settings", default="", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--busy", type=busy, default="0,1,2", help="numbers of other processes")
    parser.add_argument("--rounds", type=Range(int, 1), default=3)
    parser.add_argument("--seconds", type=Range(float, above=0), default=10.0)
    parser.add_argument("--name", default="", help="of the result file; default: by --measure")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    names = names_of(args.measure, MEASURES, "--measure")
    chosen = names_of(args.settings, tuple(SETTINGS), "--settings")
    settings = {name: SETTINGS[name] for name in chosen}
    name = args.name or "_".join(["cpu_threads", *names])
    result = compare(names, settings, args.busy, args.rounds, args.seconds, name, args.out)
    print(lined_up(cpu_threads_rows(result), left=(0, 1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
