"""The plot of an ablation: from the reference's time down to ours, and what each technique is worth."""

from __future__ import annotations

from pathlib import Path

LABELS = {
    "reference": "padded reference (nanoVLM v0.1)",
    "reference_compiled": "the same, torch.compile",
    "ours": "ours",
    "graphs": "CUDA graphs",
    "compile": "torch.compile",
    "fused_optimizer": "fused AdamW",
    "prefetch": "uint8 images, prefetched",
    "packing": "packing",
    "labelled_head": "head on labelled rows only",
    "shared_images": "one encoding an image",
    "attention": "varlen attention",
}
WHOLE = ("reference", "reference_compiled", "ours")
GREY, BLUE, GREEN, RED = "#8c959f", "#1f6feb", "#1a7f37", "#cf222e"


def label_of(name: str) -> str:
    return LABELS[name] if name in WHOLE else f"without {LABELS.get(name, name.replace(':', ' '))}"


def number(value: float, sign: str = "") -> str:
    return f"{value:{sign},.{0 if abs(value) >= 100 else 1}f}"


def bars(result: dict) -> list[tuple[str, float, float]]:
    """(name, from, to) in milliseconds: whole steps from 0, ablated ones from the time of what they were cut from.

    Ours comes last of the whole steps, then the ablation, what is worth most first; recomputation saves memory, not
    time, and is left out. Ratios within a pair of rows that were timed in turn are applied to one time of the base, so
    that bars compare.
    """
    rows = {n: row for n, row in result["variants"].items() if "median" in row and not n.startswith("recompute")}
    base = next(row["median"] for row in rows.values() if "times_base" not in row) * 1e3
    times = {name: base * row.get("times_base", 1.0) for name, row in rows.items()}
    ablated = sorted((name for name in times if name not in WHOLE), key=lambda name: -times[name])
    if "graphs" in ablated:  # the base of the other bars; ours is what they come down to with it
        ablated = ["graphs", *(name for name in ablated if name != "graphs")]
    start = {name: times.get("ours", base) if name == "graphs" else base for name in ablated}
    whole = [(name, 0.0, times[name]) for name in WHOLE if name in times]
    return whole + [(name, start[name], times[name]) for name in ablated]


def waterfall(result: dict, file: Path) -> None:
    """Draw `bars` of a result of bench.train_step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = bars(result)
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.34 * len(drawn)), constrained_layout=True)
    widest = max(max(start, end) for _, start, end in drawn)
    ours = next(end for name, _, end in drawn if name == "ours")
    for place, (name, start, end) in enumerate(drawn):
        if name in WHOLE:
            colour, text = BLUE if name == "ours" else GREY, f"{number(end)} ms"
        else:
            colour, text = GREEN if end >= start else RED, f"{number(end - start, '+')} ms ({end / start:.2f}x)"
        axis.barh(place, end - start, left=start, color=colour, height=0.62)
        axis.text(max(start, end) + 0.01 * widest, place, text, va="center", fontsize=9)
    axis.axvline(ours, color=BLUE, lw=1, ls=":")
    axis.set_yticks(range(len(drawn)), [label_of(name) for name, _, _ in drawn], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * widest)
    layers = f", {result['layers']} layers a tower" if result["layers"] else ""
    axis.set_xlabel(f"ms a step of {result['work']['tokens']:,} tokens: {result['preset']}{layers}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
