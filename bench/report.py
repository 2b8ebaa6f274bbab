"""Writes the tables of the READMEs from the committed result files: every number there is somebody's measurement.

python -m bench.report            write
python -m bench.report --check    exit with 1 if a table is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.registry import KERNELS
from bench.results import ROOT

README = ROOT.parent.parent / "README.md"
MARKS = ("<!-- results: written by python -m bench.report -->", "<!-- end of results -->")
NEEDED = ("device", "date", "commit", "command", "torch")


def load(file: Path) -> dict:
    """A result file. Raises ValueError if it does not say where it comes from."""
    result = json.loads(file.read_text())
    if missing := [name for name in NEEDED if not result.get(name) or result[name] == "unknown"]:
        raise ValueError(f"{file}: no {', '.join(missing)}")
    return result


def table(results: Path = ROOT) -> str:
    """The README's table: a row a measurement, with machine and commit."""
    rows = [("what", "measured", "on", "commit", "command")]
    for file in sorted(results.glob("*/train_tiny*.json")):
        run = load(file)
        sight = f"sees **{run['sees']:.1%}** · blind {run['blind']:.1%}"
        minutes = f"{run['train_seconds'] / 60:.1f} min of training"
        what = f"easy-VQA test split, {run['questions']:,} questions, exact match by generation"
        rows.append((what, f"{sight}, {minutes}", run["device"], run["commit"][:7], f"`{run['train_command']}`"))
        if file.stem != "train_tiny":  # other seeds and lengths
            continue
        packing = f"{run['packing']:.1%} filled; {run['data_wait']:.1%} of the time waiting for data"
        rows.append(("its token budget", packing, run["device"], run["commit"][:7], "the same run"))
    for file in sorted(results.glob("*/train_step*.json")):
        rows.append(step_row(load(file)))
    return markdown(rows)


def step_row(step: dict) -> tuple[str, ...]:
    """A result of bench.train_step against its reference, and against that compiled where it was."""
    theirs = step["variants"].get("reference", {})
    ours = step["variants"].get("ours") or step["variants"]["packed"]  # its name in older files
    depth = step.get("layers", 0)
    layers = f" cut to {depth} layer{'s' * (depth > 1)} a tower" if depth else ""
    questions = step["work"]["questions"]
    what = f"optimizer step of `{step['preset']}`{layers} on the same {questions:,} questions, against padded"

    def both(name: str, form: Callable[[float], str]) -> str:
        return " against ".join(form(row[name]) if name in row else "-" for row in (ours, theirs))

    compiled = step.get("speedup_over_compiled")
    gain = f"**{step['speedup']:.1f}x**" if "speedup" in step else "-"
    gain += f" ({compiled:.1f}x with the reference compiled)" if compiled else ""
    gain += f": {both('questions_per_s', lambda rate: f'{rate:,.{1 if rate < 100 else 0}f}')} questions/s"
    gain += f", MFU {both('mfu', '{:.1%}'.format)}" if "mfu" in ours else ""
    gain += f", {both('peak_mib', '{:,.0f}'.format)} MiB; gradients agree to {step['parity']['gradient']:.0e}"
    options = step["command"].split("bench.train_step", 1)[-1]
    return what, gain, step["device"], step["commit"][:7], f"`python -m bench.train_step{options}`"


def kernel_table(results: Path = ROOT) -> str:
    """The table of kernels/README.md: each kernel, its least work, what the assembler made of it, GPU times if any."""
    rows = [
        (
            "kernel, tests",
            "what it does",
            "forward; backward",
            "registers, shared memory, warps, occupancy on sm_90",
            "GPU",
        )
    ]
    compiled: dict[str, list[str]] = {}
    for file in results.glob("*/codegen.json"):
        for row in load(file)["kernels"]:
            launch = f"{row['registers']}, {row['shared'] / 1024:.0f} KB, {row['warps']}, {row['occupancy']:.0%}"
            compiled.setdefault(row["op"], []).append(f"`{row['kernel'].strip('_')}` {launch}")
    for kernel in KERNELS:
        about = kernel.module.__doc__.split("\n\n")[0].replace("\n", " ").strip()
        cost = kernel.module.cost(**kernel.sizes, dtype=torch.bfloat16)
        work = "; ".join(f"{cost[p][0] / 1e6:,.0f} MB, {cost[p][1] / 1e9:,.1f} GFLOP" for p in ("forward", "backward"))
        launches = "<br>".join(dict.fromkeys(compiled.get(kernel.name, ["-"])))
        name = f"`{kernel.name}`, [tests](../tests/test_{kernel.name}.py)"
        rows.append((name, about, work, launches, gpu_times(kernel.name, results)))
    return markdown(rows)


def gpu_times(name: str, results: Path) -> str:
    """Forward and forward + backward of ours and of torch.compile, for each GPU that was measured."""
    found = []
    for file in sorted(results.glob("*/kernels.json")):
        measured = load(file)
        providers = measured["kernels"].get(name, {}).get("providers", {})
        times = [
            f"{who} {row['forward']['median'] * 1e6:.0f} / {row['both']['median'] * 1e6:.0f} us"
            for who in ("ours", "compile")
            if "both" in (row := providers.get(who, {}))
        ]
        if times and not measured["small"]:
            found.append(f"{measured['device']}: {', '.join(times)}")
    return "<br>".join(found) or "not measured yet"


def markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


TABLES = {README: table, README.parent / "kernels" / "README.md": kernel_table}


def updated(text: str, written: str) -> str:
    """`text` with what stands between the marks replaced. Raises ValueError if the marks are missing."""
    start, end = text.find(MARKS[0]), text.find(MARKS[1])
    if start < 0 or end < start:
        raise ValueError("a README has lost the marks around its results table")
    return f"{text[: start + len(MARKS[0])]}\n{written}\n{text[end:]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if something would change")
    args = parser.parse_args(argv)
    try:
        after = {file: updated(file.read_text(), make()) for file, make in TABLES.items()}
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 1
    stale = [file for file, text in after.items() if text != file.read_text()]
    for file in stale:
        if args.check:
            print(f"{file} is out of date with bench/results: run python -m bench.report", file=sys.stderr)
        else:
            file.write_text(after[file])
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
