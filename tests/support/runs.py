"""Runs of train.py for the tests: real processes, a small model; and what a run leaves."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from bench import reliability
from nanovlm_fast.cli import parse_config
from nanovlm_fast.reporting.metrics import read_metrics
from tests.support import forks

TINY = (
    "--device cpu --vit-img-size 32 --vit-hidden-dim 32 --vit-inter-dim 64 --vit-n-heads 2 "
    "--vit-n-blocks 1 --lm-hidden-dim 32 --lm-inter-dim 64 --lm-n-heads 2 --lm-n-kv-heads 1 "
    "--lm-n-blocks 1 --mp-pixel-shuffle-factor 2 --look-ahead 16 --tokens-per-batch 512 "
    "--val-samples 8 --log-every 1 --save-every 3 --data synthetic:32"
).split()
torchrun = reliability.start  # as it is: one test replaces it there
CONVERSATION = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
]


def arguments(out: Path, options: str) -> list[str]:
    return ["train.py", *TINY, "--out", str(out), *options.split()]


def train(out: Path, options: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return forks.run(*arguments(out, options), **env)


def start(run: Path, processes: int, options: list[str]) -> forks.Fork | subprocess.Popen:
    """Start a run as bench.reliability does; a single process is a fork."""
    if processes > 1:
        return torchrun(run, processes, options)
    with run.with_suffix(".log").open("ab") as log:
        return forks.start(["train.py", "--out", str(run), *options], log, log)


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    """The last line of the output of a run that failed.

    Progress bars may precede it, but a traceback may not.
    """
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"(train\.py: )?error: ", last), (
        f"the last line is not the error: {result.stderr[-500:]}"
    )
    return last


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, and what is in it."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timed = re.compile(r"seconds|data_wait|.*_per_s")
    return [
        {name: v for name, v in line.items() if not timed.fullmatch(name)}
        for line in read_metrics(run)
    ]


def losses(run: Path) -> dict[int, float]:
    found = [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), (
        "each step exactly once, in order"
    )
    return dict(found)


def different_tensors(run: Path, other: Path) -> list[str]:
    """The names of the tensors that differ in any bit between the runs' last checkpoints.

    The tensors are those of the weights, the optimizer and the random state.
    """
    ours, theirs = (
        {
            **load_file(folder / "last" / "model.safetensors"),
            **load_file(folder / "last" / "optimizer.safetensors"),
        }
        for folder in (run, other)
    )
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def write_llava(folder: Path, good: int) -> list[str]:
    """Write a data set in LLaVA's format with `good` examples and four bad ones.

    Returns what must be reported about the bad ones.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for i in range(good + 1):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / f"{i}.jpg")
        records.append(json.dumps({"image": f"{i}.jpg", "conversations": CONVERSATION}))
    whole = (folder / f"{good}.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt.png").write_bytes(b"no image at all")
    for name in ("truncated.jpg", "corrupt.png", "missing.png"):
        records.insert(2, json.dumps({"image": name, "conversations": CONVERSATION}))
    records[-1] = records[-1][:-9]
    (folder / "train.jsonl").write_text("\n".join(records) + "\n")
    return ["truncated.jpg", "corrupt.png", "missing.png", f"train.jsonl:{len(records)}"]


def trainer(loop, out: Path, options: str):
    alone = [
        "--workers",
        "0",
        "--hang-timeout",
        "0",
    ]  # a watchdog would end the tests once nobody trains any more
    return loop.Trainer(*parse_config([*TINY, "--out", str(out), *alone, *options.split()]))
