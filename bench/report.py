"""Writes tables and pictures from the committed result files; no number in a page is typed by hand.

python -m bench.report            write
python -m bench.report --check    exit with 1 if a table or a picture is out of date
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.checks import check_rows
from bench.dataloader import RATE, workers_for
from bench.device_facts import facts_rows
from bench.figures import THEMES, Figure, figures, source_of
from bench.kernels import against_compile
from bench.profile_step import profile_rows
from bench.race import race_rows
from bench.readme import Rows, highlights, markdown, reliability, scale, table
from bench.registry import KERNELS, NOTHING
from bench.results import ROOT, load, measurements
from bench.scaling import GPUS, NODE, verdict
from bench.timing import Difference, difference
from nanovlm_fast.command import Parser, reports_errors

README = ROOT.parent.parent / "README.md"


def marks(name: str) -> tuple[str, str]:
    """The comments that enclose a table in a page."""
    return f"<!-- {name}: written by python -m bench.report -->", f"<!-- end of {name} -->"


MARKS = marks("results")


# ---- kernels/README.md


def kernel_table(results: Path = ROOT) -> str:
    """The table of kernels/README.md: least work, the assembler's resources, GPU times if any."""
    resources = "registers, shared memory, warps, occupancy on sm_90"
    rows: Rows = [("file, tests", "what it does", "forward; backward", resources, "GPU")]
    compiled: dict[str, list[str]] = {}
    for file in results.glob("*/codegen.json"):
        for row in load(file)["kernels"]:
            launch = f"{row['registers']}, {row['shared'] / 1024:.0f} KB, {row['warps']}"
            launch += f", {row['occupancy']:.0%}"
            compiled.setdefault(row["op"], []).append(f"`{row['kernel'].strip('_')}` {launch}")
    for kernel in KERNELS:
        about = (kernel.module.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()
        cost = kernel.module.cost(**kernel.sizes, dtype=torch.bfloat16)
        passes = [cost[part] for part in ("forward", "backward")]
        work = "; ".join(f"{b / 1e6:,.0f} MB, {flops / 1e9:,.1f} GFLOP" for b, flops in passes)
        # Kernels that are compiled for several cases with the same result appear once.
        launches = "<br>".join(dict.fromkeys(compiled.get(kernel.name, ["-"])))
        name = f"`{kernel.name}.py`, [tests](../tests/test_{kernel.name}.py)"
        rows.append((name, about, work, launches, gpu_times(kernel.name, results)))
    return markdown(rows)


def gpu_times(name: str, results: Path) -> str:
    """Forward, and forward + backward, of ours and of torch.compile, for each measured GPU."""
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


# ---- bench/README.md


def us(row: dict, digits: int = 1) -> str:
    """The median in microseconds."""
    return f"{row['median'] * 1e6:,.{digits}f}"


def ms(row: dict) -> str:
    """The median in milliseconds, with quartiles."""
    low = row["lower_quartile"] * 1e3
    high = row["upper_quartile"] * 1e3
    return f"{row['median'] * 1e3:,.3g} ({low:,.3g}-{high:,.3g})"


def optional(row: dict, name: str, form: str) -> str:
    return form.format(row[name]) if row.get(name) is not None else "-"


def speed_over(step: dict, name: str, against: str = "reference") -> Difference | None:
    """How many times as fast a row of bench.train_step is as another; None if one has no time.

    Rows that were timed in pairs with a base carry their ratio to it. Two such rows are compared
    through the base, and that comparison has no interval.
    """
    row = step["variants"].get(name, {})
    other = step["variants"].get(against, {})
    if "median" not in row or "median" not in other:
        return None
    if name == against:
        return Difference(1.0, 1.0, 1.0)
    if any("times_base" in r for r in step["variants"].values()):
        ratio = other.get("times_base", 1.0) / row.get("times_base", 1.0)
        paired = over_base(step, against) if "times_base" not in row else None
        return paired or Difference(ratio, ratio, ratio)
    return difference(row["seconds"], other["seconds"], row.get("noise", 0.0))


def over_base(step: dict, name: str) -> Difference | None:
    """How many times the base's time a row of bench.train_step takes, from the times of their pair.

    Older files keep only the base's times of its first pair. There the result is None for rows of
    other pairs, which are recognised by a ratio that those times do not give. None for the base.
    """
    row = step["variants"][name]
    rows = step["variants"].values()
    if "times_base" not in row:
        return None
    base = row.get("base_seconds") or next(
        r["seconds"] for r in rows if "median" in r and "times_base" not in r
    )
    found = difference(base, row["seconds"])
    return found if math.isclose(found.ratio, row["times_base"], rel_tol=1e-6) else None


def train_step_rows(step: dict, against: str = "reference") -> Rows:
    """The table of a result of bench.train_step; speeds are relative to the row `against`."""
    # A column that only files with pairs have.
    paired = ("of the base's time",) * any("times_base" in row for row in step["variants"].values())
    head = ("variant", "step ms (quartiles)", *paired, "speed", "questions/s", "tokens/s", "MFU")
    rows: Rows = [(*head, "peak MiB")]
    for name, row in step["variants"].items():
        if "median" not in row:
            rows.append((name, row.get("error", "-"), *["-"] * (len(rows[0]) - 2)))
            continue
        share = "the base"
        if "times_base" in row:
            share = str(over_base(step, name) or f"{row['times_base']:.2f}x")
        speed = speed_over(step, name, against)
        shown = "-"
        if speed is not None:  # equal ends: the ratio went through the base and has no interval
            shown = f"{speed.ratio:.2f}x" if speed.low == speed.high else str(speed)
        rates = (optional(row, name, "{:,.0f}") for name in ("questions_per_s", "tokens_per_s"))
        rest = (optional(row, "mfu", "{:.1%}"), optional(row, "peak_mib", "{:,.0f}"))
        rows.append((name, ms(row), *[share] * len(paired), shown, *rates, *rest))
    return rows


def add_failure(rows: Rows, name: str, provider: str, error: str) -> None:
    """Add a row for what could not run, unless an earlier row reports the same error."""
    if error != NOTHING and not any(row[1:3] == (provider, error) for row in rows):
        rows.append((name, provider, error, *["-"] * (len(rows[0]) - 3)))


def peer_rows(result: dict) -> Rows:
    """Theirs and ours in each case; files from before there were cases have one."""
    rows: Rows = []
    for name, case in result.get("cases", {"1 question per image": result}).items():
        head, *pair = train_step_rows(case, "nanovlm")
        rows += [("case", *head)] * (not rows) + [(name, *row) for row in pair]
    return rows


def kernels_rows(result: dict) -> Rows:
    head = ("kernel", "provider", "forward us", "backward us", "both us", "of copy, fwd")
    rows: Rows = [(*head, "speed against compile")]
    for name, kernel in result["kernels"].items():
        for provider, row in kernel["providers"].items():
            if "error" in row:
                add_failure(rows, name, provider, row["error"])
                continue
            moved = kernel["cost"]["forward"][0] / row["forward"]["median"]
            share = f"{moved / result['copy_bytes_per_s']:.0%}"
            times = (us(row[part]) for part in ("forward", "backward", "both"))
            speed = against_compile(kernel["providers"], provider)
            rows.append((name, provider, *times, share, speed))
    return rows


def attention_rows(result: dict) -> Rows:
    head = ("documents", "backend", "forward us", "backward us", "both us", "GFLOP/s", "of padded")
    rows: Rows = [head]
    for name, case in result["cases"].items():
        against = case["providers"].get("reference", {}).get("both")
        for provider, row in case["providers"].items():
            if "error" in row:
                add_failure(rows, name, provider, row["error"])
                continue
            share = f"{row['both']['median'] / against['median']:.0%}" if against else "-"
            times = (us(row[part]) for part in ("forward", "backward", "both"))
            rate = f"{row['both']['flops_per_s'] / 1e9:,.0f}"
            rows.append((name, provider, *times, rate, share))
    return rows


def memory_rows(result: dict) -> Rows:
    samples = list(dict.fromkeys(n for rows in result["peaks"].values() for n in rows))
    rows: Rows = [("peak MiB by samples per step", *samples)]
    for name, row in result["peaks"].items():
        cells = (optional(row.get(n, {}), "peak_mib", "{:,.0f}") for n in samples)
        errors = (row.get(n, {}).get("error") for n in samples)
        rows.append((name, *(error or cell for cell, error in zip(cells, errors, strict=True))))
    return rows


def dataloader_rows(result: dict) -> Rows:
    head = ("stage, or the loader with so many workers", "on the fly, samples/s")
    rows: Rows = [(*head, "prepared, samples/s", "times")]
    rows += [(stage, f"{rate:,.0f}", "-", "-") for stage, rate in result["stages"].items()]
    for workers, gain in result["speedup"].items():
        ways = (result["samples_per_s"][way] for way in ("on the fly", "prepared"))
        rates = (f"{way[workers]:,.0f}" for way in ways)
        rows.append((f"{workers} workers", *rates, f"{gain:.2f}x"))
    rate = result.get("rate", RATE)
    if needed := workers_for(result["samples_per_s"], rate):
        counts = (f"{needed[way]} workers" for way in ("on the fly", "prepared"))
        rows.append((f"to feed {rate:,.0f} samples/s, at the rate of 1 worker", *counts, "-"))
    return rows


def generate_rows(result: dict) -> Rows:
    head = ("batch", "variant", "first token ms", "all tokens ms", "tokens/s", "decoding tokens/s")
    rows: Rows = [head]
    for batch, found in result["batches"].items():
        for name, row in found["variants"].items():
            if "error" in row:
                rows.append((batch, name, row["error"], *["-"] * 3))
                continue
            parts = (row["tokens_per_s"], row["decode_tokens_per_s"])
            rates = (f"{rate:,.0f}" if rate else "-" for rate in parts)
            rows.append((batch, name, ms(row["first_token"]), ms(row["all_tokens"]), *rates))
    return rows


def roofline_rows(result: dict) -> Rows:
    rates, work, floor = (result[part] for part in ("rates", "work", "floor_seconds"))
    rows: Rows = [("floor of a step", "ms", "share")]
    for kind, seconds in sorted(result["by_kind"].items(), key=lambda item: -item[1]):
        rows.append((kind, f"{seconds * 1e3:,.2f}", f"{seconds / floor:.1%}"))
    what = f"**{result['preset']}, {work['images']:,} images, {work['tokens']:,} tokens at"
    what += f" {rates['flops'] / 1e12:.3g} TFLOP/s and {rates['bandwidth'] / 1e9:,.0f} GB/s**"
    rows.append((what, f"**{floor * 1e3:,.1f}**", f"{result['samples_per_s']:,.0f} samples/s"))
    return rows


def scaling_rows(result: dict) -> Rows:
    shown = (str(NODE), "64", str(GPUS[-1]))
    heads = (f"{int(gpus):,} GPUs: ms, of them exposed, efficiency" for gpus in shown)
    sent = f"MB sent per GPU ({NODE} GPUs)"
    rows: Rows = [("gradients", sent, *heads, f"under {result['enough']:.0%}")]
    for name, mode in result["modes"].items():
        sizes = (mode["weak"][gpus] for gpus in shown)
        cells = (
            f"{r['seconds'] * 1e3:.1f}, {r['exposed'] * 1e3:.2f}, {r['efficiency']:.1%}"
            for r in sizes
        )
        sent = f"{mode['weak'][str(NODE)]['sent'] / 1e6:,.0f}"
        rows.append((name, sent, *cells, verdict(mode["below"])))
    compute = result["compute"]
    one = f"{compute['seconds'] * 1e3:.1f} ms on one"
    what = f"**{result['preset']}, {compute['samples']:,} samples per GPU: {one}**"
    rows.append((what, "-", compute["source"], "-", "-", "-"))
    traffic = result.get("traffic") or {"rows": {}}
    for name, row in traffic["rows"].items():
        counted, expected, ring = (row[part] / 1e6 for part in ("sent", "expected", "ring"))
        by = f"{expected:,.3f} by the formula"
        if ring != expected:  # gloo needs more passes than a ring does
            by += f" ({ring:,.3f} on a ring)"
        what = f"{traffic['processes']} gloo processes, counted: {name}"
        rows.append((what, f"{counted:,.3f}", by, f"{row['ratio']:.3f}x", "-", "-"))
    return rows


def training_rows(run: dict) -> Rows:
    head = ("run", "sees", "blind", "minutes", "steps", "tokens/s", "budget filled")
    shares = (f"{run['sees']:.1%}", f"{run['blind']:.1%}", f"{run['train_seconds'] / 60:.1f}")
    rates = (f"{run['steps']:,}", f"{run['tokens_per_s']:,.0f}")
    rest = (f"{run['packing']:.1%}", f"{run['data_wait']:.1%}")
    return [(*head, "waiting for data"), (f"`{run['train_command']}`", *shares, *rates, *rest)]


def optimizers_rows(result: dict) -> Rows:
    head = ("seed", "AdamW's last loss", "its steps", "Muon's steps to it", "Muon's last loss")
    rows: Rows = [head]
    for row in result["verdict"]:
        muon = f"{row['muon_steps']:,}" if row["muon_steps"] else "never"
        losses = (f"{row['loss']:.4f}", f"{row['muon_loss']:.4f}")
        rows.append((str(row["seed"]), losses[0], f"{row['steps']:,}", muon, losses[1]))
    return rows


def curves_rows(result: dict) -> Rows:
    head = ("variant", "seed", "furthest from the reference's loss", "the seeds there", "share")
    rows: Rows = [head]
    for row in result["rows"]:
        numbers = (f"{row['difference']:.1e}", f"{row['spread']:.1e}", f"{row['share']:.1%}")
        rows.append((row["variant"], str(row["seed"]), *numbers))
    return rows


def timed_rows(result: dict) -> Rows:
    """The table of any other suite: everything in its file that has a median."""
    rows: Rows = [("measurement", "ms (quartiles)")]
    for path, row in measurements(result):
        time = ms(row) if "lower_quartile" in row else f"{row['median'] * 1e3:,.3g}"
        rows.append((" · ".join(path), time))
    return rows


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
    line = f"**{origin}** · {source} · `{result['command']}`"
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


# ---- all of them


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"results": highlights},
    README.parent / "kernels" / "README.md": {"results": kernel_table},
    README.parent / "bench" / "README.md": {"summary": table, "results": suites_page},
    README.parent / "nanovlm_fast" / "training" / "README.md": {"scale": scale, "reliability": reliability},
}


def updated(text: str, written: str, name: str = "results") -> str:
    """Return `text` with the part between the marks replaced; raise ValueError without marks."""
    first, last = marks(name)
    start = text.find(first)
    end = text.find(last)
    if start < 0 or end < start:
        raise ValueError(f"a README has lost the marks around its {name} table")
    return f"{text[: start + len(first)]}\n{written}\n{text[end:]}"


def page(file: Path) -> str:
    """The page with all its tables written again."""
    text = file.read_text()
    for name, make in TABLES[file].items():
        text = updated(text, make(), name)
    return text


def stale_pictures(results: Path = ROOT) -> tuple[list[Figure], list[Path]]:
    """Pictures to draw, and drawn files (with a digest) that no result calls for any more."""
    drawn = [figure for folder in devices(results) for figure in figures(folder)]
    wanted = {figure.file(theme) for figure in drawn for theme in THEMES}
    files = (file for theme in THEMES for file in results.glob(f"*/*_{theme}.png"))
    there = {file for file in files if source_of(file)}
    return [figure for figure in drawn if figure.stale()], sorted(there - wanted)


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    return parser


@reports_errors(KeyError)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    after = {file: page(file) for file in TABLES}
    to_draw, left_over = stale_pictures()
    stale = [file for file, text in after.items() if text != file.read_text()]
    if args.check:
        for file in (*stale, *(figure.file("light") for figure in to_draw), *left_over):
            how = "is out of date with bench/results: run python -m bench.report"
            print(f"{file} {how}", file=sys.stderr)
        return int(bool(stale or to_draw or left_over))
    for file in stale:
        file.write_text(after[file])
    for figure in to_draw:
        figure.write()
    for file in left_over:
        file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
