"""The pictures of bench/README.md, drawn from result files, for light and for dark pages.

A picture's metadata holds the digest of the files that it was drawn from, so that an outdated one
is noticed without drawing it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.results import load
from bench.memory import label_of as memory_label
from bench.optimizers import smoothed

WIDTH = 9.0  # inches; a README is about 900 pixels wide
DPI = 130
LABELS = {
    "reference": "padded reference (nanoVLM v0.1)",
    "reference_compiled": "the same, torch.compile",
    "packed": "ours",  # its name in older files
    "ours": "ours",
    "graphs": "CUDA graphs",
    "compile": "torch.compile",
    "fused_optimizer": "fused AdamW",
    "prefetch": "uint8 images, prefetched",
    "packing": "packing",
    "labelled_head": "head on labelled rows only",
    "shared_images": "one encoding per image",
    "attention": "varlen attention",
}
OURS = ("packed", "ours")
# Whole steps; every other row is ours without one technique.
WHOLE = ("reference", "reference_compiled", *OURS)


@dataclass(frozen=True)
class Theme:
    """Colours of a page, its text and its lines."""

    page: str
    text: str
    faint: str
    ours: str
    others: str
    series: tuple[str, ...]


THEMES = {
    "light": Theme(
        "#ffffff",
        "#1f2328",
        "#d0d7de",
        "#1f6feb",
        "#8c959f",
        ("#1f6feb", "#bc4c00", "#1a7f37", "#8250df"),
    ),
    "dark": Theme(
        "#0d1117",
        "#e6edf3",
        "#30363d",
        "#58a6ff",
        "#8b949e",
        ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff"),
    ),
}


@dataclass(frozen=True)
class Figure:
    """One picture: `paint(axes, theme)` draws on `panels` axes side by side.

    It is saved as <stem>_light.png and <stem>_dark.png; `alt` describes it in the page.
    """

    stem: Path
    alt: str
    sources: tuple[Path, ...]
    paint: Callable[[list, Theme], None]
    height: float = 3.4
    panels: int = 1

    def file(self, theme: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}_{theme}.png")

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"".join(source.read_bytes() for source in self.sources)).hexdigest()

    def stale(self) -> bool:
        """Whether a picture is missing, or was drawn from files that have changed since."""
        return any(source_of(self.file(theme)) != self.digest for theme in THEMES)

    def write(self) -> None:
        import matplotlib
        # Imported here: drawing is rare, and everything else in this module needs no matplotlib.

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        for name, theme in THEMES.items():
            colours: Any = {  # the stubs of matplotlib list every key as a literal
                "text.color": theme.text,
                "axes.labelcolor": theme.text,
                "xtick.color": theme.text,
                "ytick.color": theme.text,
                "axes.edgecolor": theme.faint,
                "grid.color": theme.faint,
                "axes.facecolor": theme.page,
                "figure.facecolor": theme.page,
                "font.size": 10,
            }
            with plt.rc_context(colours):
                size = (WIDTH, self.height)
                figure, axes = plt.subplots(
                    1, self.panels, figsize=size, squeeze=False, layout="constrained"
                )
                for axis in axes[0]:
                    axis.spines[["top", "right"]].set_visible(False)
                    axis.grid(lw=0.6)
                    axis.set_axisbelow(True)
                self.paint(list(axes[0]), theme)
                # No "Software" entry: it would change the file with every version of matplotlib.
                metadata = {"Source": self.digest, "Software": None}
                figure.savefig(self.file(name), dpi=DPI, metadata=metadata)
                plt.close(figure)


def source_of(file: Path) -> str | None:
    """The digest of what a picture was drawn from; None if there is no picture or no digest."""
    from PIL import Image

    if not file.exists():
        return None
    with Image.open(file) as image:
        return image.info.get("Source")


def figures(folder: Path) -> list[Figure]:
    """All pictures that can be drawn from the results of one device."""
    found = [waterfall(file) for file in sorted(folder.glob("train_step*.json"))]
    if (roofline := folder / "roofline.json").exists():
        found.append(roof(roofline, folder / "kernels.json"))
    if (memory := folder / "memory.json").exists():
        found.append(memory_by_samples(memory))
    if runs := sorted(folder.glob("train_tiny*.json")):
        found.append(training(folder, runs))
    if (optimizers := folder / "optimizers.json").exists():
        found.append(races(optimizers))
    if (scaling := folder / "scaling.json").exists():
        found.append(efficiencies(scaling))
    found += [race_to_target(file) for file in sorted(folder.glob("race*.json"))]
    found += [compiled(file) for file in sorted(folder.glob("compiled_step*.json"))]
    return [figure for figure in found if figure is not None]


def label_of(name: str) -> str:
    return LABELS[name] if name in WHOLE else f"without {LABELS.get(name, name.replace(':', ' '))}"


def number(value: float, sign: str = "") -> str:
    return f"{value:{sign},.{0 if abs(value) >= 100 else 1}f}"


def bars(step: dict) -> list[tuple[str, float, float]]:
    """(name, from, to) in milliseconds: whole steps start at 0, ablated ones at their base.

    Ours is the last of the whole steps. The ablation follows, the most valuable technique first.
    Recomputation saves memory, not time, and is left out. Rows were timed in pairs; their ratios
    are applied to one time of the base, so that the bars can be compared with each other.
    """
    rows = {
        n: row
        for n, row in step["variants"].items()
        if "median" in row and not n.startswith("recompute")
    }
    base = next((row["median"] * 1e3 for row in rows.values() if "times_base" not in row), 0.0)
    times = {
        n: base * row["times_base"] if "times_base" in row else row["median"] * 1e3
        for n, row in rows.items()
    }
    ablated = sorted((name for name in times if name not in WHOLE), key=lambda name: -times[name])
    # Graphs are the base of the other bars; ours is what they come down to with them.
    if "graphs" in ablated:
        ablated = ["graphs", *(name for name in ablated if name != "graphs")]
    start = {name: times.get("ours", base) if name == "graphs" else base for name in ablated}
    whole = [(name, 0.0, times[name]) for name in WHOLE if name in times]
    return whole + [(name, start[name], times[name]) for name in ablated]


def waterfall(file: Path) -> Figure | None:
    """An optimizer step: the reference's time, ours, and what each technique is worth."""
    step = load(file)
    drawn = bars(step)
    if len(drawn) < 2:
        return None
    whole = {name: end for name, _, end in drawn if name in WHOLE}

    def paint(axes: list, theme: Theme) -> None:
        (axis,) = axes
        widest = max(max(start, end) for _, start, end in drawn)
        for place, (name, start, end) in enumerate(drawn):
            if name in WHOLE:
                colour = theme.ours if name in OURS else theme.others
                text = f"{number(end)} ms"
                if name in OURS and "reference" in whole:
                    text += f" ({whole['reference'] / end:.2f}x as fast)"
            else:
                colour = theme.series[2 if end >= start else 1]
                text = f"{number(end - start, '+')} ms ({end / start:.2f}x the time)"
            axis.barh(place, end - start, left=start, color=colour, height=0.62)
            axis.text(max(start, end) + 0.01 * widest, place, text, va="center", fontsize=9)
        for name in set(OURS) & whole.keys():
            axis.axvline(whole[name], color=theme.ours, lw=1, ls=":")
        axis.set_yticks(range(len(drawn)), [label_of(name) for name, _, _ in drawn], fontsize=9)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlim(0, 1.3 * widest)  # room for the text at the end of the bars
        layers = f", {step['layers']} layers per tower" if step.get("layers") else ""
        work = f"{step['work']['questions']:,} questions, {step['work']['tokens']:,} tokens"
        axis.set_xlabel(f"ms per step of {work}: {step['preset']}{layers}", fontsize=9)

    rest = ", and without each technique" if len(drawn) > len(whole) else ""
    alt = f"Time of an optimizer step of {step['preset']} on {step['device']}{rest}"
    return Figure(file.with_suffix(""), alt, (file,), paint, height=0.8 + 0.34 * len(drawn))


def roof(file: Path, kernels: Path) -> Figure:
    """FLOP/s by FLOPs per byte: the roof, a step's operators on it, measured kernels below."""
    result = load(file)
    rates = result["rates"]
    sources = (file, kernels) if kernels.exists() else (file,)
    measured = load(kernels) if kernels.exists() else {"small": True}

    def paint(axes: list, theme: Theme) -> None:
        (axis,) = axes
        knee = rates["flops"] / rates["bandwidth"]
        operators = [o for o in result["operators"] if o["flops"]]
        kinds = sorted({o["kind"] for o in operators})
        for colour, kind in zip(theme.series[1:], kinds, strict=False):
            some = [o for o in operators if o["kind"] == kind]
            size = [20 + 1500 * o["floor"] / result["floor_seconds"] for o in some]
            x = [o["flops"] / o["bytes"] for o in some]
            y = [o["flops"] / o["floor"] for o in some]
            axis.scatter(x, y, s=size, alpha=0.6, color=colour, label=kind)
        points = [] if measured["small"] else kernel_points(measured)
        for intensity, rate, name in points:
            axis.scatter(intensity, rate, s=40, marker="D", color=theme.ours)
            place: dict[str, Any] = dict(xytext=(6, -4), textcoords="offset points", fontsize=8)
            axis.annotate(name, (intensity, rate), **place)
        all_x = [o["flops"] / o["bytes"] for o in operators] + [p[0] for p in points] + [knee]
        ends = [min(all_x) / 2, knee, max(all_x) * 2]
        heights = [ends[0] * rates["bandwidth"], rates["flops"], rates["flops"]]
        axis.plot(ends, heights, color=theme.text, lw=1.2)
        axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="FLOP/s")
        only_moves = sum(o["floor"] for o in result["operators"] if not o["flops"])
        moves = only_moves / result["floor_seconds"]
        axis.set_title(
            f"{rates['flops'] / 1e12:.3g} TFLOP/s, {rates['bandwidth'] / 1e9:,.0f} GB/s; area: "
            f"share of the step's floor. {moves:.0%} of it only moves memory and is not drawn",
            fontsize=10,
        )
        axis.legend(frameon=False, loc="lower right", markerscale=0.6)

    alt = f"Roofline of a step of {result['preset']} on {result['device']}"
    return Figure(file.with_name("roofline"), alt, sources, paint, height=3.9)


def kernel_points(measured: dict) -> list[tuple[float, float, str]]:
    """(FLOPs per byte, FLOP/s, name) of the forwards of our kernels."""
    points = []
    for name, kernel in measured["kernels"].items():
        moved, flops = kernel["cost"]["forward"]
        row = kernel["providers"].get("ours", {})
        if "forward" in row:
            points.append((flops / moved, flops / row["forward"]["median"], name))
    return points


def memory_by_samples(file: Path) -> Figure | None:
    """Peak memory by samples per step."""
    result = load(file)
    lines = {}
    for name, rows in result["peaks"].items():
        points = [(int(n), row["peak_mib"]) for n, row in rows.items() if "peak_mib" in row]
        if points:
            lines[name] = points
    if not lines:
        return None

    def paint(axes: list, theme: Theme) -> None:
        (axis,) = axes
        ours = iter(theme.series)
        for name, points in lines.items():
            colour = theme.others if name == "reference" else next(ours, theme.text)
            label = memory_label(name).replace("_", " ")
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        if result["preset"] == "nanovlm-222m" and not result["layers"]:
            known = [(int(n), mib) for n, mib in result["published_mib"].items() if mib]
            label = "nanoVLM, published (H100)"
            axis.plot(*zip(*known, strict=True), "x", color=theme.text, label=label)
        axis.set(xlabel="samples per step", ylabel="peak MiB")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.legend(frameon=False)

    alt = f"Peak memory of a step of {result['preset']} on {result['device']}"
    return Figure(file.with_name("memory"), alt, (file,), paint, height=3.6)


def training(folder: Path, files: list[Path]) -> Figure:
    """Whole runs over time: held-out accuracy, and the loss if the file has it."""
    runs = {file.stem: load(file) for file in files}
    panels = [name for name in ("loss", "curve") if any(run.get(name) for run in runs.values())]

    def paint(axes: list, theme: Theme) -> None:
        colours = [theme.series[i % len(theme.series)] for i in range(len(runs))]
        for axis, panel in zip(axes, panels, strict=True):
            for colour, run in zip(colours, runs.values(), strict=True):
                points = [(seconds / 60, value) for seconds, value in run.get(panel, [])]
                if points:
                    style: dict[str, Any] = dict(
                        marker="o" if panel == "curve" else None, color=colour, lw=1.3
                    )
                    label = " ".join(run["options"]) or "no options"
                    axis.plot(*zip(*points, strict=True), label=label, **style)
            ylabel = {"loss": "loss", "curve": "held-out accuracy"}[panel]
            axis.set(xlabel="minutes of training", ylabel=ylabel)
            axis.set_xlim(left=0)
            if panel == "loss":
                axis.set_yscale("log")
        axes[-1].legend(frameon=False, loc="lower right", title="python train.py", alignment="left")

    (device,) = {run["device"] for run in runs.values()}
    alt = f"Training runs of the tiny preset on {device}, against the clock"
    stem = folder / "train_tiny_clock"
    return Figure(stem, alt, tuple(files), paint, height=3.4, panels=len(panels))


def races(file: Path) -> Figure:
    """Muon's and AdamW's runs: the smoothed loss and the held-out accuracy by step."""
    result = load(file)

    def paint(axes: list, theme: Theme) -> None:
        colours = {"muon": theme.ours, "adamw": theme.others}
        for record in result["runs"]:
            for axis, curve in zip(axes, (smoothed(record), record["accuracy"]), strict=True):
                colour = colours[record["optimizer"]]
                label = {"muon": "Muon", "adamw": "AdamW, three rates"}[record["optimizer"]]
                axis.plot(*zip(*curve, strict=True), color=colour, lw=1.3, label=label)
        for axis, name in zip(axes, ("loss", "held-out accuracy"), strict=True):
            axis.set(xlabel="step", ylabel=name)
        axes[0].set_yscale("log")
        # By label: AdamW's three runs share one entry of the legend.
        named = dict(zip(*reversed(axes[1].get_legend_handles_labels()), strict=True))
        axes[1].legend(named.values(), named.keys(), frameon=False)

    alt = f"Training with Muon and with AdamW on {result['device']}: loss and held-out accuracy"
    return Figure(file.with_suffix(""), alt, (file,), paint, height=3.6, panels=2)


def efficiencies(file: Path) -> Figure:
    """Weak and strong scaling, as bench.scaling models them."""
    result = load(file)
    drawn = (
        "DDP {}, overlapped, ring or tree",
        "DDP {}, no overlap, ring or tree",
        "DDP {}, overlapped, ring",
        "FSDP2 {}, overlapped",
    )
    step = "the measured" if result["compute"]["measured"] else "an estimated"
    basis = f"a model based on {step} step of one GPU"

    def paint(axes: list, theme: Theme) -> None:
        weak, fixed = axes
        for name, colour in zip(drawn, theme.series, strict=True):
            for kind, line in (("float32", "-"), ("bfloat16", ":")):
                rows = result["modes"][name.format(kind)]["weak"]
                label = name.replace("{}, ", "") if kind == "float32" else None
                points = [(int(gpus), 100 * row["efficiency"]) for gpus, row in rows.items()]
                weak.plot(*zip(*points, strict=True), line, color=colour, lw=1.5, label=label)
            rows = result["strong"].get(name.format("float32"), {})
            if rows:
                points = [(int(gpus), 100 * row["efficiency"]) for gpus, row in rows.items()]
                fixed.plot(*zip(*points, strict=True), color=colour, lw=1.5)
        # Without communication all modes are the same, so any of them gives this curve.
        any_mode = next(iter(result["strong"].values()))
        points = [(int(gpus), 100 * row["links_free"]) for gpus, row in any_mode.items()]
        free: dict[str, Any] = dict(
            color=theme.others, lw=1.5, ls="--", label="if communication were free"
        )
        fixed.plot(*zip(*points, strict=True), **free)
        samples = result["compute"]["samples"]
        titles = (
            f"{samples} samples per GPU (dotted: bfloat16 gradients)",
            f"{samples} samples in all",
        )
        for axis, title in zip(axes, titles, strict=True):
            axis.axhline(100 * result["enough"], color=theme.text, lw=0.8, ls="--")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set(xlabel=f"GPUs ({basis})", ylabel="efficiency, %", ylim=(0, 108))
            axis.set_title(title, fontsize=10)
            axis.legend(frameon=False, fontsize=8, loc="lower left")

    alt = f"Efficiency of {result['preset']} on 1 to 1,024 GPUs, {basis}"
    return Figure(file.with_suffix(""), alt, (file,), paint, height=3.6, panels=2)


def race_to_target(file: Path) -> Figure:
    """Accuracy on the test split over seconds of training, up to the target or to their end."""
    result = load(file)

    def paint(axes: list, theme: Theme) -> None:
        (axis,) = axes
        axis.axhline(result["target"], color=theme.text, lw=1, ls=":")
        ours = ("fast", "ours", theme.ours)
        for name, label, colour in (("reference", LABELS["reference"], theme.others), ours):
            if not (side := result["sides"].get(name)) or not side["points"]:
                continue
            reached = side["reached"]
            took = f"not reached in {number(side['seconds'])} s"
            if reached:
                took = f"{number(reached['seconds'])} s"
            points = [(point["seconds"], point["accuracy"]) for point in side["points"]]
            style: dict[str, Any] = dict(marker="o", ms=3, color=colour, lw=1.4)
            axis.plot(*zip(*points, strict=True), label=f"{label}: {took}", **style)
            if reached:
                axis.axvline(reached["seconds"], color=colour, lw=1, ls=":")
        xlabel = f"seconds of training, {result['preset']}"
        axis.set(xlabel=xlabel, ylabel="accuracy on the test split", ylim=(0, 1.02))
        axis.set_xlim(left=0)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        title = f"training time to {result['target']:.0%}"
        axis.legend(frameon=False, loc="lower right", title=title, alignment="left")

    what = f"Accuracy of {result['preset']} on {result['data']}"
    alt = f"{what} against seconds of training on {result['device']}"
    return Figure(file.with_suffix(""), alt, (file,), paint, height=3.6)


def compiled(file: Path) -> Figure | None:
    """The predicted step of every variant by kind of launch, and its floor."""
    result = load(file)
    variants = result["variants"]
    if result["small"] or len(variants) < 2:
        return None
    kinds = {
        "product": "products",
        "attention": "attention",
        "generated": "generated kernels",
        "kernel": "our kernels",
        "other": "optimizer and others",
    }

    def paint(axes: list, theme: Theme) -> None:
        (axis,) = axes
        for place, row in enumerate(variants.values()):
            start = 0.0
            for kind, colour in zip(kinds, (*theme.series, theme.others), strict=True):
                ms = row["by_kind"]["all"].get(kind, {"expected_ms": 0.0})["expected_ms"]
                label = kinds[kind] if not place else None
                axis.barh(place, ms, left=start, color=colour, height=0.62, label=label)
                start += ms
            floor = row["floor_ms"]
            axis.plot([floor, floor], [place - 0.31, place + 0.31], color=theme.text, lw=1.5)
            text = f"{row['expected_ms']:.1f} ms, {row['predicted']['mfu']:.1%} MFU"
            axis.text(start + 1, place, text, va="center", fontsize=9)
        axis.plot([], [], color=theme.text, lw=1.5, label="floor")
        axis.set_yticks(range(len(variants)), variants, fontsize=9)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlim(0, 1.4 * max(row["expected_ms"] for row in variants.values()))
        work = f"{result['work']['images']} images, {result['work']['tokens']:,} tokens"
        axis.set_xlabel(f"predicted ms per step of {work} on an H100, not measured", fontsize=9)
        axis.legend(
            frameon=False, fontsize=8, ncols=6, loc="lower left", bbox_to_anchor=(-0.25, 1.0)
        )

    alt = f"Predicted step of {result['preset']} on an H100 by kind of launch, not measured"
    height = 1.2 + 0.34 * len(variants)
    return Figure(file.with_suffix(""), alt, (file,), paint, height=height)
