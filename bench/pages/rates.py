"""Measured tokens/s by preset and device, as `train.py --dry-run` reads them from its package.

`nanovlm_fast` must not read bench/results: an installed package has no such folder. So bench.report
writes what the plan needs into the package.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from bench.compiled_step import predicted_step, result_file
from bench.harness.results import ROOT
from bench.subjects.fake_h100 import PROPERTIES
from bench.subjects.step_process import Options
from nanovlm_fast.config import TrainConfig
from nanovlm_fast.presets import PRESETS


def rates(results: Path = ROOT) -> str:
    """The text of rates.json: whole training runs, bare optimizer steps, and predicted steps."""
    found = {"runs": runs(results), "steps": steps(results), "predicted": predicted(results)}
    return json.dumps(found, indent=2) + "\n"


def runs(results: Path) -> list[dict[str, Any]]:
    """One entry per result of bench.train_run, in the order of the files."""
    found = []
    for file in sorted(results.glob("*/train_*.json")):
        run = json.loads(file.read_text())
        if not run.get("tokens_per_s"):  # another suite's file, or a run that failed
            continue
        options = run.get("options", [])
        preset = TrainConfig.preset
        if "--preset" in options:
            preset = options[options.index("--preset") + 1]
        source = f"{name(file)}: {shlex.join(options) or 'no options'}"
        found.append(entry(run["device"], preset, run["tokens_per_s"], source))
    return found


def steps(results: Path) -> list[dict[str, Any]]:
    """One entry per result of bench.train_step, of presets that were not cut to fewer layers."""
    found = []
    for preset in sorted(PRESETS):
        # bench.train_step names its files so; those of a cut model have one more suffix.
        suffix = "" if preset == "tiny" else f"_{preset}"
        for file in sorted(results.glob(f"*/train_step{suffix}.json")):
            step = json.loads(file.read_text())
            rate = step["variants"].get("ours", {}).get("tokens_per_s")
            if rate:
                found.append(entry(step["device"], preset, rate, name(file)))
    return found


def predicted(results: Path) -> list[dict[str, Any]]:
    """One entry per preset that bench.compiled_step has compiled for an H100."""
    found = []
    for preset in sorted(PRESETS):
        if step := predicted_step(preset, results):
            source = name(result_file(Options(preset=preset), results))
            found.append(entry(PROPERTIES.name, preset, step.tokens_per_s, source))
    return found


def entry(device: str, preset: str, tokens_per_s: float, source: str) -> dict[str, Any]:
    return {"device": device, "preset": preset, "tokens_per_s": tokens_per_s, "source": source}


def name(file: Path) -> str:
    return f"bench/results/{file.parent.name}/{file.name}"
