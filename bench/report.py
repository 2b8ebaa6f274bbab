"""Writes the tables of README.md from the committed result files: every number there is somebody's measurement.

python -m bench.report            write
python -m bench.report --check    exit with 1 if a table is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

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
        packing = f"{run['packing']:.1%} filled; {run['data_wait']:.1%} of the time waiting for data"
        rows.append(("its token budget", packing, run["device"], run["commit"][:7], "the same run"))
    for file in sorted(results.glob("*/train_step.json")):
        step = load(file)
        ours, theirs = (step["variants"][name] for name in ("packed", "reference"))
        work = f"optimizer step of `{step['preset']}` on the same {step['work']['questions']} questions, against padded"
        rates = f"{ours['questions_per_s']:,.0f} against {theirs['questions_per_s']:,.0f} questions/s"
        memory = f"{ours['peak_mib']:,.0f} against {theirs['peak_mib']:,.0f} MiB"
        gain = f"**{step['speedup']:.1f}x**: {rates}, {memory}; gradients agree to {step['parity']['gradient']:.0e}"
        rows.append((work, gain, step["device"], step["commit"][:7], "`python -m bench.train_step`"))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def updated(readme: str, results: Path = ROOT) -> str:
    """README with its table rewritten. Raises ValueError if the marks around it are missing."""
    start, end = readme.find(MARKS[0]), readme.find(MARKS[1])
    if start < 0 or end < start:
        raise ValueError("README.md has lost the marks around its results table")
    return f"{readme[: start + len(MARKS[0])]}\n{table(results)}\n{readme[end:]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if something would change")
    args = parser.parse_args(argv)
    try:
        before = README.read_text()
        after = updated(before)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 1
    if not args.check:
        README.write_text(after)
    elif before != after:
        print("README.md is out of date with bench/results: run python -m bench.report", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
