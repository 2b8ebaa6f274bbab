"""Muon against AdamW on easy-VQA: which reaches the same loss in fewer steps, over three seeds.

    python -m bench.optimizers

Whole runs of train.py that differ only in the optimizer. AdamW's learning rate is the best of three
that are tried on the first seed; Muon's is the preset's. optimizers.json is written after each run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from bench.harness.options import split_options
from bench.harness.results import write
from bench.train_run import TRAIN
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device
from nanovlm_fast.ranges import Range
from nanovlm_fast.reporting.metrics import read_metrics

SEEDS = (0, 1, 2)
ADAMW_RATES = (1e-3, 2e-3, 4e-3)
WINDOW = 10  # log lines over which a loss is averaged


def run(optimizer: str, seed: int, options: list[str], rate: float | None = None) -> dict:
    """One training run: its losses and held-out accuracies by step.

    Raises RuntimeError if the run fails.
    """
    command = ["--optimizer", optimizer, "--seed", str(seed), "--no-final-eval"]
    if rate:
        for name in ("projector", "vision", "language"):
            command += [f"--lr-{name}", str(rate)]
    command += options  # last, so that options of the caller win
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, str(TRAIN), "--out", f"{folder}/run", *command]
        code = subprocess.run(call, stdout=subprocess.DEVNULL).returncode
        if code:
            raise RuntimeError(f"train.py {' '.join(command)} failed with exit code {code}")
        lines = read_metrics(Path(folder) / "run")
    return {
        "optimizer": optimizer,
        "seed": seed,
        "lr": rate,
        "loss": [[line["step"], round(line["loss"], 5)] for line in lines if "loss" in line],
        "accuracy": [[line["step"], line["accuracy"]] for line in lines if "accuracy" in line],
    }


def smoothed(record: dict) -> list[tuple[int, float]]:
    """(step, mean loss of the last WINDOW log lines) for every log line."""
    losses = [loss for _, loss in record["loss"]]
    return [
        (step, statistics.fmean(losses[max(0, i - WINDOW + 1) : i + 1]))
        for i, (step, _) in enumerate(record["loss"])
    ]


def final_loss(record: dict) -> float:
    return smoothed(record)[-1][1]


def steps_to(record: dict, loss: float) -> int | None:
    """Steps until the smoothed loss is at most `loss` and stays there; None if it never does."""
    reached = None
    for step, value in smoothed(record):
        if value > loss:  # it rose again, so an earlier step does not count
            reached = None
        elif reached is None:
            reached = step
    return reached


def steps_to_equal(runs: list[dict]) -> list[dict]:
    """Per seed: the final loss of AdamW at its best rate, and the steps Muon needed to reach it."""
    rows = []
    for seed in SEEDS:
        adamw = [r for r in runs if r["optimizer"] == "adamw" and r["seed"] == seed]
        muon = [r for r in runs if r["optimizer"] == "muon" and r["seed"] == seed]
        if adamw and muon:
            best = min(adamw, key=final_loss)
            row = {
                "seed": seed,
                "loss": final_loss(best),
                "muon_loss": final_loss(muon[0]),
                "steps": best["loss"][-1][0],
                "muon_steps": steps_to(muon[0], final_loss(best)),
                "accuracy": best["accuracy"][-1][1],
                "muon_accuracy": muon[0]["accuracy"][-1][1],
            }
            rows.append(row)
    return rows


def compare(options: list[str], device: torch.device, out: Path | None) -> dict:
    """All runs, written to the result file as they finish."""
    plan: list[tuple[str, int, float | None]] = [("muon", SEEDS[0], None)]
    plan += [("adamw", SEEDS[0], rate) for rate in ADAMW_RATES]
    runs: list[dict] = []
    result: dict = {}
    with tqdm(total=len(plan) + 2 * (len(SEEDS) - 1), desc="runs", unit="run") as bar:
        while plan:
            optimizer, seed, rate = plan.pop(0)
            runs.append(run(optimizer, seed, options, rate))
            bar.update()
            # All rates have been tried on the first seed: the other seeds use the best one.
            if not plan and len(runs) == 1 + len(ADAMW_RATES):
                best = min((r for r in runs if r["optimizer"] == "adamw"), key=final_loss)["lr"]
                for seed in SEEDS[1:]:
                    plan += [("muon", seed, None), ("adamw", seed, best)]
            result = {"options": options, "runs": runs, "verdict": steps_to_equal(runs)}
            write("optimizers", device, result, out)
    return result


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.optimizers", description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=Range(float, above=0), default=5.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    own, handed_on = split_options(argv)
    args = make_parser().parse_args(own)
    device = pick_device(args.device)
    options = ["--epochs", str(args.epochs), "--device", str(device), *handed_on]
    result = compare(options, device, args.out)
    for row in result["verdict"]:
        adamw = f"AdamW ends at {row['loss']:.4f} in {row['steps']:,} steps"
        muon = f"in {row['muon_steps']:,} steps"
        if not row["muon_steps"]:
            muon = f"never (its last loss is {row['muon_loss']:.4f})"
        print(f"seed {row['seed']}: {adamw}; Muon reaches that {muon}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
