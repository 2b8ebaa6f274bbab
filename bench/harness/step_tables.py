"""What `bench.compiled_step` prints about its variants. Milliseconds are predictions."""

from __future__ import annotations

from typing import Any

from bench.subjects.lowered import spilled


def kinds_table(variant: dict[str, Any]) -> str:
    head = f"{'direction':9} {'kind':10} {'launches':>8} {'distinct':>8} {'GB read':>8}"
    lines = [f"{head} {'written':>8} {'TFLOP':>7} {'floor ms':>9} {'predicted':>9}"]
    for direction, kinds in variant["by_kind"].items():
        for kind, row in kinds.items():
            counts = f"{row['launches']:>8,} {row['distinct']:>8,}"
            moved = f"{row['read_gb']:>8.2f} {row['written_gb']:>8.2f} {row['tflop']:>7.2f}"
            times = f"{row['floor_ms']:>9.2f} {row['expected_ms']:>9.2f}"
            lines.append(f"{direction:9} {kind:10} {counts} {moved} {times}")
    return "\n".join(lines)


def dearest_table(variant: dict[str, Any]) -> str:
    head = f"{'predicted':>9} {'floor':>7} {'calls':>5} {'MB read':>8} {'written':>8}"
    lines = [f"{head}  in all calls of a kernel"]
    for row in variant["dearest"]:
        moved = f"{row['read_mb']:>8.1f} {row['written_mb']:>8.1f}"
        flags = " ".join(name for name in ("atomic", "moves_only") if row[name])
        times = f"{row['expected_ms']:>9.3f} {row['floor_ms']:>7.3f} {row['calls']:>5}"
        lines.append(f"{times} {moved}  {row['direction']} {row['name'][:70]} {flags}".rstrip())
        if row["where"]:
            lines.append(f"{'':42}at {row['where']}")
    return "\n".join(lines)


def variants_table(variants: dict[str, Any]) -> str:
    width = max(map(len, variants))
    head = f"{'variant':{width}} {'launches':>8} {'GB':>7} {'floor ms':>9} {'predicted':>9}"
    lines = [f"{head} {'tokens/s':>9} {'MFU':>6} {'peak GB':>8}"]
    for label, row in variants.items():
        moved = f"{row['launches']:>8,} {row['read_gb'] + row['written_gb']:>7.1f}"
        times = f"{row['floor_ms']:>9.2f} {row['expected_ms']:>9.1f}"
        rates = f"{row['predicted']['tokens_per_s']:>9,.0f} {row['predicted']['mfu']:>6.1%}"
        lines.append(f"{label:{width}} {moved} {times} {rates} {row['peak_gb']:>8.1f}")
    return "\n".join(lines)


def machine_code_line(kernels: dict[str, dict[str, int]]) -> str:
    """Generated kernels in one line: how many compile, spill, and what they take at most."""
    rows = kernels.values()
    tried = sum(row["configurations"] for row in rows)
    failed = sum(row["failed"] for row in rows)
    spills = [name for name, row in kernels.items() if spilled(row)]
    most = max((row["registers"] for row in rows), default=0)
    shared = max((row["shared"] for row in rows), default=0)
    counts = f"{len(kernels)} generated kernels in {tried} configurations"
    found = f"{failed} do not compile, {len(spills)} kernels spill {' '.join(spills)}".rstrip()
    return f"{counts}: {found}; at most {most} registers and {shared:,} bytes of shared memory"


def report(result: dict[str, Any], label: str) -> str:
    """What the command prints about one variant."""
    row = result["variants"][label]
    work = result["work"]
    vision, language = result["layers"]
    predicted = row["predicted"]
    lines = [
        f"{result['preset']}, {vision} + {language} layers, {label}: {row['graphs']} graphs, "
        f"{row['graph_breaks']} graph breaks; {work['images']} images, {work['tokens']:,} tokens, "
        f"{work['labels']:,} labels in a budget of {result['budget']['images']} images",
        kinds_table(row),
        f"moves only: {row['moves_only']} launches, {row['moves_only_gb']:.1f} GB, "
        f"{row['moves_only_ms']:.2f} ms; atomics in {row['atomics']} launches; memory: "
        f"{row['resident_gb']:.2f} GB held, {row['peak_gb']:.2f} GB at the peak",
    ]
    if "machine_code" in row:
        lines += [machine_code_line(row["machine_code"]), dearest_table(row)]
    lines.append(
        f"floor {row['floor_ms']:.2f} ms; predicted, not measured: {predicted['step_ms']:.1f} ms, "
        f"{predicted['tokens_per_s']:,.0f} tokens/s, {predicted['mfu']:.1%} MFU"
    )
    return "\n".join(lines)
