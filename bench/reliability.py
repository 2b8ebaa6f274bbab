"""Does a run survive kills at random moments, and does its memory stay level over resumes?

    python -m bench.reliability              25 kills in 1 and in 2 processes, 2,000 steps of soak
    python -m bench.reliability --quick      3 kills, 60 steps

Kills are SIGKILL, of all processes or of one rank of two; every third one falls in the middle of a
save. The losses of the killed run must equal those of an undisturbed run, to the bit; anything else
ends with an error. The soak resumes a run many times in one process and records what it holds.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness.results import write
from nanovlm_fast.cli import parse_config
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device
from nanovlm_fast.reporting.metrics import read_metrics
from train import Trainer

HERE = Path(__file__).resolve().parent.parent
# A model whose steps take milliseconds, so that kills are not mostly spent waiting for steps.
SMALL = (
    "--vit-img-size 32 --vit-hidden-dim 32 --vit-inter-dim 64 --vit-n-heads 2 --vit-n-blocks 1 "
    "--lm-hidden-dim 32 --lm-inter-dim 64 --lm-n-heads 2 --lm-n-kv-heads 1 --lm-n-blocks 1 "
    "--mp-pixel-shuffle-factor 2 --look-ahead 16 --tokens-per-batch 512 --val-samples 0 "
    "--log-every 1 --save-every 3 --data synthetic:32 --no-final-eval --device cpu"
).split()
ATTEMPT_LIMIT = 240.0  # seconds that one attempt may take


def command(run: Path, processes: int, options: list[str]) -> list[str]:
    """The command of train.py, under torchrun if there are several processes."""
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher = runner if processes > 1 else []
    return [sys.executable, *launcher, "train.py", "--out", str(run), *options]


def start(run: Path, processes: int, options: list[str]) -> subprocess.Popen:
    """Start or resume the run as leader of a process group; its output is appended to RUN.log.

    The group lets `kill` reach torchrun, all ranks and their data workers at once.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    with run.with_suffix(".log").open("ab") as log:
        call = command(run, processes, options)
        return subprocess.Popen(
            call, cwd=HERE, env=env, stdout=log, stderr=log, start_new_session=True
        )


def losses(run: Path) -> dict[int, float]:
    """Losses by step, from metrics.jsonl."""
    if not (run / "metrics.jsonl").exists():
        return {}
    return {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}


def ranks_of(torchrun: int) -> list[int]:
    """Process ids of torchrun's children that run train.py."""
    found = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return [int(pid) for pid in found if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill(
    process: subprocess.Popen, run: Path, in_a_save: bool, one_rank: bool, rng: random.Random
) -> bool:
    """Let the run make progress, then SIGKILL it; return False if it had ended before that."""
    before = len(losses(run))
    deadline = time.monotonic() + ATTEMPT_LIMIT
    # Progress is a new loss: a run that is killed before it would never end.
    while process.poll() is None and len(losses(run)) in (0, before):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5))
    # A checkpoint is written into a folder .tmp-*; the kill must hit while that folder exists.
    while in_a_save and process.poll() is None and time.monotonic() < deadline:
        if any((run / "checkpoints").glob(".tmp-*")):
            break
    if process.poll() is not None:
        return False
    if one_rank and (ranks := ranks_of(process.pid)):
        os.kill(rng.choice(ranks), signal.SIGKILL)  # torchrun then ends the other ranks
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    return True


def end_of_log(run: Path) -> str:
    return run.with_suffix(".log").read_text()[-2000:]


def kills(folder: Path, processes: int, count: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Kill a run `count` times, resume it each time, and compare it with an undisturbed run.

    Raises RuntimeError if an attempt fails, the run ends too early, or a loss differs.
    """
    rng = random.Random(seed)
    began = time.monotonic()
    plain = folder / f"plain{processes}"
    broken = folder / f"broken{processes}"
    options = [*SMALL, "--max-steps", str(steps), "--auto-resume"]
    if start(plain, processes, options).wait(ATTEMPT_LIMIT):
        raise RuntimeError(f"the undisturbed run failed:\n{end_of_log(plain)}")
    # Steps per kill that were done after the last checkpoint, so must be repeated.
    lost: list[int] = []
    in_saves = 0
    for number in range(count):
        process = start(broken, processes, options)
        in_a_save = number % 3 == 2
        one_rank = processes > 1 and number % 2 == 1
        if not kill(process, broken, in_a_save, one_rank, rng):
            raise RuntimeError(f"the run ended before kill {number}:\n{end_of_log(broken)}")
        in_saves += any((broken / "checkpoints").glob(".tmp-*"))
        saved = [int(step.name[5:]) for step in (broken / "checkpoints").glob("step-*")]
        lost.append(len(losses(broken)) - max(saved, default=0))
    if code := start(broken, processes, options).wait(ATTEMPT_LIMIT):
        raise RuntimeError(f"the last attempt: exit code {code}\n{end_of_log(broken)}")
    if losses(broken) != losses(plain) or len(losses(plain)) != steps:
        raise RuntimeError("the losses of the killed run differ from those of the undisturbed run")
    return {
        "processes": processes,
        "kills": count,
        "in_a_save": in_saves,
        "steps": steps,
        "steps_repeated": {"median": statistics.median(lost), "most": max(lost)},
        "losses_equal": True,
        "wall_clock": round(time.monotonic() - began, 1),
    }


def resources() -> dict[str, int]:
    """What this process and its children hold: bytes, open files, processes, threads."""
    children = [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    children = [pid for pid in children if Path(f"/proc/{pid}").exists()]  # may have ended since
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return {
        "host_bytes": resident,
        "device_bytes": device,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "children": len(children),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def soak(run: Path, steps: int, every: int, options: list[str]) -> dict[str, Any]:
    """Train preset tiny in this process, resumed every `every` steps; record what it holds then.

    `growth` compares the mean of the last half with that of the quarter before it, as a share of
    the latter. The first quarter does not count, because caches are still filling.
    """
    readings = []
    began = time.monotonic()
    for end in range(every, steps + 1, every):
        argv = ["--out", str(run), "--max-steps", str(end), "--val-samples", "0", "--auto-resume"]
        argv += options
        trainer = Trainer(*parse_config(argv))
        trainer.train()
        trainer.watchdog.stop()
        assert trainer.state.step == end
        del trainer
        # Cycles hold much of it until a collection, which the loop does at every save as well.
        gc.collect()
        readings.append(resources())
    quarter = max(len(readings) // 4, 1)

    def mean(name: str, part: list[dict[str, int]]) -> float:
        return statistics.mean(reading[name] for reading in part)

    settled = readings[quarter : 2 * quarter]
    late = readings[-2 * quarter :]
    growth: dict[str, float] = {}
    for name in readings[0]:
        base = mean(name, settled)
        growth[name] = mean(name, late) / base - 1 if base else 0.0
    return {
        "steps": steps,
        "resumes": len(readings) - 1,
        "growth": growth,
        "samples": readings,
        "wall_clock": round(time.monotonic() - began, 1),
    }


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.reliability", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    count, steps, soaked, every = (3, 60, 60, 20) if args.quick else (25, 300, 2000, 100)
    device = pick_device(args.device)
    result: dict[str, Any] = {"kills": []}
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            result["kills"].append(kills(Path(folder), processes, count, steps))
            print(json.dumps(result["kills"][-1]))
            # At once: the rest takes long, and an error there must not lose this.
            file = write("reliability", device, result, args.out)
        options = ["--device", args.device, "--log-every", "50"]
        result["soak"] = soak(Path(folder) / "soak", soaked, every, options)
        shown = {name: value for name, value in result["soak"].items() if name != "samples"}
        print(json.dumps(shown))
        file = write("reliability", device, result, args.out)
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
