"""The table of what was found, for people: as it is printed, and to paste into an issue."""

from __future__ import annotations

from typing import Any

from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.candidates import WAITS, Choice
from nanovlm_fast.tune.search import Row

HEADS = ("candidate", "timed in", "ms", "of what it replaces", "of the step", "verdict")


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    verdict = f"{row.verdict}: {row.why}" if row.why else row.verdict
    if row.seconds is None or row.low is None or row.high is None or not row.base:
        return (row.name, row.part, "", "", "", verdict)
    gain = 0.0 if row.of_step is None else -row.of_step
    return (
        row.name,
        row.part,
        f"{row.seconds * 1e3:.3f}",
        f"{row.seconds / row.base:.3f} ({row.low:.3f} to {row.high:.3f})",
        f"{gain:+.1%}",
        verdict,
    )


def table(rows: list[Row]) -> str:
    """The rows in lined-up columns."""
    lines = [HEADS, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    padded = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table; a reason may hold any text."""
    lines = ["| " + " | ".join(HEADS) + " |", "| --- | --- | --: | --: | --: | --- |"]
    for row in rows:
        safe = (cell.replace("|", "\\|") for cell in cells(row))
        lines.append("| " + " | ".join(safe) + " |")
    return "\n".join(lines)


def options_of(choice: Choice, plain: Choice | None = None) -> str:
    """What of a choice differs from plain, as a user gives it to train.py."""
    plain = plain or Choice(compile=choice.compile)
    words = []
    if choice.threads not in (0, plain.threads):
        words.append(f"OMP_NUM_THREADS={choice.threads}")
    if choice.waiting != plain.waiting:
        words += [f"{name}={value}" for name, value in WAITS[choice.waiting].items()]
    if choice.kernels != plain.kernels:
        words.append(f"--kernels {choice.kernel_option}")
    if choice.inductor != plain.inductor:
        words.append(f"--inductor {','.join(choice.inductor) or 'none'}")
    for name in ("dtype", "attention", "vision_attention", "compile", "workers"):
        if (value := getattr(choice, name)) != getattr(plain, name):
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words) or "what train.py does by itself"


def summary(entry: Entry) -> str:
    """The table, and what was chosen."""
    done = "" if entry.done else " (interrupted)"
    lines = [
        f"tuned for {entry.key['device']} on {entry.date}, in {entry.seconds:.0f} s{done}:",
        table(entry.rows),
        f"chosen: {options_of(entry.choice, entry.plain)}",
    ]
    return "\n".join(lines)


def for_an_issue(entry: Entry) -> str:
    """What `--report` prints: device, versions, sizes and the table, in Markdown."""
    key: dict[str, Any] = entry.key
    lines = [f"### Tuned on {key['device']}", ""]
    for name, value in key.items():
        if name not in ("device", "model", "set") and value not in ("", None):
            shown = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else value
            )
            lines.append(f"- {name}: {shown}")
    sizes = ", ".join(f"{k} {v}" for k, v in key["model"].items())
    lines += [f"- model: {sizes}", f"- measured: {entry.date}, in {entry.seconds:.0f} s", ""]
    lines += [markdown(entry.rows), "", f"Chosen: `{options_of(entry.choice, entry.plain)}`"]
    return "\n".join(lines)
