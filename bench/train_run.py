"""A whole training run as a measurement: accuracy with and without images, time, curve, pictures.

python -m bench.train_run                      the run of the README: preset tiny on easy-VQA
python -m bench.train_run -- --epochs 32       options after -- go to train.py
python -m bench.train_run --demo               python -m nanovlm_fast.demo in place of train.py
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.harness.options import split_options
from bench.harness.results import write
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device
from nanovlm_fast.reporting.metrics import read_metrics

# The pictures of a run that a page shows, by the name of its result; those of others are not kept.
SHOWN = {"train_tiny": ("curves", "samples"), "demo": ("samples",)}
ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train.py"
# Programs that train, from the repository's root
TRAIN_PY = ["train.py"]
DEMO = ["-m", "nanovlm_fast.demo"]


def train(run: Path, program: list[str], options: list[str]) -> dict[str, Any]:
    """Run a program that trains in its own process; return what a result file says of the run.

    Raises RuntimeError if the run fails.
    """
    command = shlex.join(["python", *program, *options])
    call = [sys.executable, *program, "--out", str(run), *options]
    code = subprocess.run(call, cwd=ROOT).returncode
    if code:
        raise RuntimeError(f"{command} failed with exit code {code}")
    final = json.loads((run / "result.json").read_text())
    lines = read_metrics(run)
    losses = [line for line in lines if line.get("loss") is not None]
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    return {
        "options": options,
        "train_command": command,
        "sees": final["seeing"]["accuracy"],
        "blind": final["blind"]["accuracy"],
        "questions": final["seeing"]["questions"],
        "by_kind": final["seeing"]["by_kind"],
        "blind_by_kind": final["blind"]["by_kind"],
        "train_seconds": final["seconds"],
        "steps": final["step"],
        "packing": final["tokens"] / max(final["capacity"], 1),
        "data_wait": _mean([line["data_wait"] for line in lines if "data_wait" in line]),
        # The last 20 lines: the first ones include compilation and the start of the workers.
        "tokens_per_s": _mean(rates[-20:]),
        "loss": [[line["seconds"], round(line["loss"], 5)] for line in losses],
        "curve": [[line["seconds"], line["accuracy"]] for line in lines if "accuracy" in line],
    }


def measure(args: argparse.Namespace, options: list[str], device: torch.device) -> Path:
    """Train and write the result file; return the file. Raises RuntimeError if the run fails."""
    name = args.name or ("demo" if args.demo else "train_tiny")
    program = DEMO if args.demo else TRAIN_PY
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / name
        file = write(name, device, train(run, program, options), args.out)
        for picture in SHOWN.get(name, ()):
            shutil.copy(run / f"{picture}.png", file.with_name(f"{name}_{picture}.png"))
    return file


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.train_run", description=__doc__.splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="run python -m nanovlm_fast.demo")
    parser.add_argument("--name", default="", help="of the result file; default: train_tiny, demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    own, handed_on = split_options(argv)
    args = make_parser().parse_args(own)
    device = pick_device(args.device)
    options = handed_on
    if args.device != "auto":
        options = [*options, "--device", args.device]
    file = measure(args, options, device)
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
