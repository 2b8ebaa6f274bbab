"""The sections of bench/README.md, one for each suite."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checks import check_rows
from bench.device_facts import facts_rows
from bench.harness.results import ROOT, load
from bench.pages.figures import THEMES, Figure, figures
from bench.pages.readme import Rows, markdown, shown_command
from bench.pages.rows import (
    attention_rows,
    curves_rows,
    dataloader_rows,
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
from bench.race import race_rows


@dataclass(frozen=True)
class Section:
    """Result files by the beginning of their name; a `promised` section appears without any."""

    stem: str
    about: str
    rows: Callable[[dict[str, Any]], Rows] = timed_rows
    promised: bool = False


SCALING = """What communication costs. The first rows are a model of an H100's step on 1 to 1,024
GPUs, not a measurement on more than one. The last rows count the bytes that two gloo processes
send, which checks the model's formulas. `bench/scaling.py` says what is modelled and what is left
out; its command prints all numbers of GPUs, and strong scaling. "No overlap" is what a backward
compiled into one graph gets. FSDP2 may exceed 100%, because it divides the optimizer's update as
well. gloo's reduce-scatter sends as much as an all-reduce, twice as much as a ring's."""
STEP = """One optimizer step on the same samples: padded nanoVLM, ours, ours minus one technique.

Rows are timed in pairs, interleaved with the base. "Of the base's time" is the ratio of the
medians within the pair, with its interval where the file has the times of both. "Speed" is
relative to the reference. It goes through the base, and has an interval only where base and
reference are that pair."""
RACE = """From random weights to 95% of easy-VQA's test split: padded nanoVLM against ours, in time.

Both start from the same weights and train on the same batches; only the cost of a step differs."""
PEER = """huggingface/nanoVLM's own code and ours, on the same weights and samples.

Its own collator makes its rows. With texts of one length and one question per image, there is no
padding for ours to skip and no image to share."""
SECTIONS = (
    Section("race", RACE, race_rows, promised=True),
    Section("train_step", STEP, train_step_rows),
    Section("train_tiny", "Whole runs of `train.py`, with and without images.", training_rows),
    Section("loss_curves", "The same training four ways, relative to seeds.", curves_rows),
    Section("kernels", "Each kernel beside its rivals, at nanoVLM's sizes.", kernels_rows),
    Section("attention", "Attention backends on documents of several lengths.", attention_rows),
    Section("memory", "Peak memory of a step by samples per step.", memory_rows),
    Section("dataloader", "From images and text to packed batches.", dataloader_rows),
    Section("generate", "Greedy generation on the same weights.", generate_rows),
    Section("peer", PEER, peer_rows),
    Section("roofline", "The least time of a step at the machine's rates.", roofline_rows),
    Section("scaling", SCALING, scaling_rows),
    Section("profile", "One of our steps, kernel by kernel.", profile_rows),
    Section("facts", "Rates, clocks and power of the device.", facts_rows),
    Section("tests", "`pytest -m gpu` on the device.", check_rows),
    Section("optimizers", "Steps to the same loss with Muon and AdamW.", optimizers_rows),
)


def suites_page(results: Path = ROOT) -> str:
    """The results of bench/README.md: a section per suite, a table per file, and pictures."""
    parts = []
    drawn = [figure for folder in devices(results) for figure in figures(folder)]
    for section in SECTIONS:
        files = sorted(results.glob(f"*/{section.stem}*.json"))
        if not files:
            if section.promised:
                parts.append(f"### {section.stem}\n\n{section.about}\n\nNot measured yet.")
            continue
        parts.append(f"### {section.stem}\n\n{section.about}")
        for file in files:
            parts += file_parts(section, file)
        parts += [picture(figure) for figure in drawn if figure.sources[0] in files]
        if section.stem == "loss_curves":
            parts += [own_picture(file) for file in files if own(file).exists()]
    return "\n\n".join(parts)


def file_parts(section: Section, file: Path) -> list[str]:
    """The line that says where a file comes from, and its table."""
    result = load(file)
    origin = result["device"]
    if kind(result):
        origin = f"{kind(result)} timings: {origin}"
    place = os.path.relpath(file, ROOT.parent)
    source = f"[{result['commit'][:7]}, {result['date'][:10]}]({place})"
    line = f"**{origin}** · {source} · `{shown_command(result)}`"
    if notes := "; ".join(result.get("machine", {}).get("warnings", ())):
        line += f" · {notes}"
    # A rehearsal at toy sizes has times, but they mean nothing.
    rows: Rows = [("no time", "")] if result.get("small") else section.rows(result)
    return [line, markdown(rows) if len(rows) > 1 else "A rehearsal, or nothing that was timed."]


def kind(result: dict) -> str:
    """'CPU' or 'GPU'; '' for results that were timed on neither."""
    if result["device"].startswith("none") or not result.get("timed", True):
        return ""
    return "GPU" if "NVIDIA" in result["device"] else "CPU"


def devices(results: Path) -> list[Path]:
    return sorted(folder for folder in results.iterdir() if folder.is_dir())


def own(file: Path) -> Path:
    """The picture that bench.loss_curves draws itself, before its file rounds the differences."""
    return file.with_suffix(".png")


def own_picture(file: Path) -> str:
    return f"![{file.stem} on {load(file)['device']}]({os.path.relpath(own(file), ROOT.parent)})"


def picture(figure: Figure) -> str:
    light, dark = (os.path.relpath(figure.file(theme), ROOT.parent) for theme in THEMES)
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{source}<img alt="{figure.alt}" src="{light}" width="900"></picture>'
