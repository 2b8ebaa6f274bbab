"""The sections of bench/README.md, one for each suite."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.checks import check_rows
from bench.cpu_threads import cpu_threads_rows
from bench.device_facts import facts_rows
from bench.harness.kernel_sets import set_rows
from bench.harness.results import ROOT, load
from bench.harness.tables import Rows, markdown
from bench.harness.tune import tune_rows
from bench.pages.figures import THEMES, Figure, figures
from bench.pages.race import race_rows
from bench.pages.readme import shown_command
from bench.pages.rows import (
    attention_rows,
    compiled_step_rows,
    curves_rows,
    dataloader_rows,
    demo_rows,
    generate_rows,
    kernels_rows,
    memory_rows,
    optimizers_rows,
    peer_rows,
    roofline_rows,
    scaling_rows,
    timed_rows,
    train_step_rows,
    training_rows,
)
from bench.profile_step import profile_rows
from bench.suites import SUITES, Suite
from bench.tiles.legible import legible_rows

# The tables of suites that have one of their own; all others list what they timed.
ROWS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "attention": attention_rows,
    "compiled_step": compiled_step_rows,
    "cpu_threads": cpu_threads_rows,
    "dataloader": dataloader_rows,
    "demo": demo_rows,
    "facts": facts_rows,
    "generate": generate_rows,
    "kernels": kernels_rows,
    "loss_curves": curves_rows,
    "memory": memory_rows,
    "optimizers": optimizers_rows,
    "peer": peer_rows,
    "profile": profile_rows,
    "race": race_rows,
    "roofline": roofline_rows,
    "scaling": scaling_rows,
    "tests": check_rows,
    "tiny_split": legible_rows,
    "kernel_sets": set_rows,
    "train_step": train_step_rows,
    "train_tiny": training_rows,
    "tune": tune_rows,
}
# Beside a result file, whose name without .json is put in.
OWN_PICTURES = {"loss_curves": "{}.png", "tiny_split": "{}_*_samples.png", "demo": "{}_samples.png"}


def suites_page(results: Path = ROOT) -> str:
    """The results of bench/README.md: a section per suite, a table per file, and pictures."""
    parts = []
    drawn = [figure for folder in devices(results) for figure in figures(folder)]
    for suite in SUITES:
        files = sorted(results.glob(f"*/{suite.name}*.json"))
        if not suite.section or not (files or suite.promised):
            continue
        parts += [f"### {suite.name}", *filter(None, (suite.about, suite.details))]
        if not files:
            parts.append("Not measured yet.")
        for file in files:
            parts += file_parts(suite, file)
        parts += [picture(figure) for figure in drawn if figure.sources[0] in files]
        parts += [own_picture(file, image) for file in files for image in own(suite, file)]
    return "\n\n".join(parts)


def file_parts(suite: Suite, file: Path) -> list[str]:
    """The line that says where a file comes from, and its table."""
    result = load(file)
    origin = result["device"]
    if kind := device_kind(result):
        origin = f"{kind} timings: {origin}"
    place = os.path.relpath(file, ROOT.parent)
    source = f"[{result['commit'][:7]}, {result['date'][:10]}]({place})"
    line = f"**{origin}** · {source} · `{shown_command(result)}`"
    if notes := "; ".join(result.get("machine", {}).get("warnings", ())):
        line += f" · {notes}"
    # A rehearsal at toy sizes has times, but they mean nothing.
    rows: Rows = [("no time", "")]
    if not result.get("small"):
        rows = ROWS.get(suite.name, timed_rows)(result)
    return [line, markdown(rows) if len(rows) > 1 else "A rehearsal, or nothing that was timed."]


def device_kind(result: dict) -> str:
    """'CPU' or 'GPU'; '' for results that were timed on neither."""
    if result["device"].startswith("none") or not result.get("timed", True):
        return ""
    return "GPU" if "NVIDIA" in result["device"] else "CPU"


def devices(results: Path) -> list[Path]:
    return sorted(folder for folder in results.iterdir() if folder.is_dir())


def own(suite: Suite, file: Path) -> list[Path]:
    """The pictures that the suite draws itself, of what its file does not hold in full."""
    pattern = OWN_PICTURES.get(suite.name, "")
    return sorted(file.parent.glob(pattern.format(file.stem))) if pattern else []


def own_picture(file: Path, image: Path) -> str:
    return f"![{image.stem} on {load(file)['device']}]({os.path.relpath(image, ROOT.parent)})"


def picture(figure: Figure) -> str:
    light, dark = (os.path.relpath(figure.file(theme), ROOT.parent) for theme in THEMES)
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img alt="{figure.alt}" src="{light}" width="900"></picture>'
