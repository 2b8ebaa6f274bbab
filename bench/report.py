"""Writes tables and pictures from the committed result files: every number there is somebody's measurement.

python -m bench.report            write
python -m bench.report --check    exit with 1 if a table or a picture is out of date
"""

from __future__ import annotations

import argparse
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

README = ROOT.parent.parent / "README.md"


def marks(name: str) -> tuple[str, str]:
    """What stands around a table in a page."""
    return f"<!-- {name}: written by python -m bench.report -->", f"<!-- end of {name} -->"


MARKS = marks("results")


# ---- kernels/README.md


def kernel_table(results: Path = ROOT) -> str:
    """The table of kernels/README.md: each kernel, its least work, what the assembler made of it, GPU times if any."""
    head = ("file, tests", "what it does", "forward; backward", "registers, shared memory, warps, occupancy on sm_90")
    rows: Rows = [(*head, "GPU")]
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
        name = f"`{kernel.name}.py`, [tests](../tests/test_{kernel.name}.py)"
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


# ---- bench/README.md


def us(row: dict, digits: int = 1) -> str:
    return f"{row['median'] * 1e6:,.{digits}f}"


def ms(row: dict) -> str:
    return f"{row['median'] * 1e3:,.3g} ({row['lower_quartile'] * 1e3:,.3g}-{row['upper_quartile'] * 1e3:,.3g})"


def optional(row: dict, name: str, form: str) -> str:
    return form.format(row[name]) if row.get(name) is not None else "-"


def speed_over(step: dict, name: str, against: str = "reference") -> Difference | None:
    """How many times as fast a row of bench.train_step is as another; None if one of the two has no time.

    Rows that were timed in pairs with a base carry the ratio to it; through the base two of them have no interval.
    """
    row, other = (step["variants"].get(who, {}) for who in (name, against))
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

    Older files keep the base's times of its first pair alone: those whose medians give the row's ratio. None for rows
    of other pairs there, and for the base.
    """
    row, rows = step["variants"][name], step["variants"].values()
    if "times_base" not in row:
        return None
    base = row.get("base_seconds") or next(r["seconds"] for r in rows if "median" in r and "times_base" not in r)
    found = difference(base, row["seconds"])
    return found if math.isclose(found.ratio, row["times_base"], rel_tol=1e-6) else None


def train_step_rows(step: dict, against: str = "reference") -> Rows:
    paired = ("of the base's time",) * any("times_base" in row for row in step["variants"].values())
    rows: Rows = [("variant", "step ms (quartiles)", *paired, "speed", "questions/s", "tokens/s", "MFU", "peak MiB")]
    for name, row in step["variants"].items():
        if "median" not in row:
            rows.append((name, row.get("error", "-"), *["-"] * (len(rows[0]) - 2)))
            continue
        share = str(over_base(step, name) or f"{row['times_base']:.2f}x") if "times_base" in row else "the base"
        speed = speed_over(step, name, against)
        bare = speed and speed.low == speed.high
        shown = "-" if speed is None else f"{speed.ratio:.2f}x" if bare else str(speed)
        rates = (optional(row, name, "{:,.0f}") for name in ("questions_per_s", "tokens_per_s"))
        rest = (optional(row, "mfu", "{:.1%}"), optional(row, "peak_mib", "{:,.0f}"))
        rows.append((name, ms(row), *[share] * len(paired), shown, *rates, *rest))
    return rows


def add_failure(rows: Rows, name: str, provider: str, error: str) -> None:
    """A row for what could not run, unless it has no such operation or an earlier row says the same of it."""
    if error != NOTHING and not any(row[1:3] == (provider, error) for row in rows):
        rows.append((name, provider, error, *["-"] * (len(rows[0]) - 3)))


def peer_rows(result: dict) -> Rows:
    return train_step_rows(result, "nanovlm")


def kernels_rows(result: dict) -> Rows:
    rows: Rows = [
        ("kernel", "provider", "forward us", "backward us", "both us", "of copy, fwd", "speed against compile")
    ]
    for name, kernel in result["kernels"].items():
        for provider, row in kernel["providers"].items():
            if "error" in row:
                add_failure(rows, name, provider, row["error"])
                continue
            share = kernel["cost"]["forward"][0] / row["forward"]["median"] / result["copy_bytes_per_s"]
            times = (us(row[part]) for part in ("forward", "backward", "both"))
            rows.append((name, provider, *times, f"{share:.0%}", against_compile(kernel["providers"], provider)))
    return rows


def attention_rows(result: dict) -> Rows:
    rows: Rows = [("documents", "backend", "forward us", "backward us", "both us", "GFLOP/s", "of padded")]
    for name, case in result["cases"].items():
        against = case["providers"].get("reference", {}).get("both")
        for provider, row in case["providers"].items():
            if "error" in row:
                add_failure(rows, name, provider, row["error"])
                continue
            share = f"{row['both']['median'] / against['median']:.0%}" if against else "-"
            times = (us(row[part]) for part in ("forward", "backward", "both"))
            rows.append((name, provider, *times, f"{row['both']['flops_per_s'] / 1e9:,.0f}", share))
    return rows


def memory_rows(result: dict) -> Rows:
    samples = list(dict.fromkeys(n for rows in result["peaks"].values() for n in rows))
    rows: Rows = [("peak MiB at samples a step", *samples)]
    for name, row in result["peaks"].items():
        cells = (optional(row.get(n, {}), "peak_mib", "{:,.0f}") for n in samples)
        errors = (row.get(n, {}).get("error") for n in samples)
        rows.append((name, *(error or cell for cell, error in zip(cells, errors, strict=True))))
    return rows


def dataloader_rows(result: dict) -> Rows:
    rows: Rows = [
        ("stage, or the loader with so many workers", "on the fly, samples/s", "prepared, samples/s", "times")
    ]
    rows += [(stage, f"{rate:,.0f}", "-", "-") for stage, rate in result["stages"].items()]
    for workers, gain in result["speedup"].items():
        rates = (f"{result['samples_per_s'][way][workers]:,.0f}" for way in ("on the fly", "prepared"))
        rows.append((f"{workers} workers", *rates, f"{gain:.2f}x"))
    rate = result.get("rate", RATE)
    if needed := workers_for(result["samples_per_s"], rate):
        counts = (f"{needed[way]} workers" for way in ("on the fly", "prepared"))
        rows.append((f"to feed {rate:,.0f} samples/s, at the rate of 1 worker", *counts, "-"))
    return rows


def generate_rows(result: dict) -> Rows:
    rows: Rows = [("batch", "variant", "first token ms", "all tokens ms", "tokens/s", "decoding tokens/s")]
    for batch, found in result["batches"].items():
        for name, row in found["variants"].items():
            if "error" in row:
                rows.append((batch, name, row["error"], *["-"] * 3))
                continue
            rates = (f"{row[part]:,.0f}" if row[part] else "-" for part in ("tokens_per_s", "decode_tokens_per_s"))
            rows.append((batch, name, ms(row["first_token"]), ms(row["all_tokens"]), *rates))
    return rows


def roofline_rows(result: dict) -> Rows:
    rates, work = result["rates"], result["work"]
    rows: Rows = [("floor of a step", "ms", "share")]
    floor = result["floor_seconds"]
    for kind, seconds in sorted(result["by_kind"].items(), key=lambda item: -item[1]):
        rows.append((kind, f"{seconds * 1e3:,.2f}", f"{seconds / floor:.1%}"))
    what = f"**{result['preset']}, {work['images']:,} images, {work['tokens']:,} tokens at"
    what += f" {rates['flops'] / 1e12:.3g} TFLOP/s and {rates['bandwidth'] / 1e9:,.0f} GB/s**"
    rows.append((what, f"**{floor * 1e3:,.1f}**", f"{result['samples_per_s']:,.0f} samples/s"))
    return rows


def scaling_rows(result: dict) -> Rows:
    shown = (str(NODE), "64", str(GPUS[-1]))
    heads = (f"{int(gpus):,} GPUs: ms, of them exposed, efficiency" for gpus in shown)
    rows: Rows = [("gradients", f"MB a GPU sends ({NODE} GPUs)", *heads, f"under {result['enough']:.0%}")]
    for name, mode in result["modes"].items():
        sizes = (mode["weak"][gpus] for gpus in shown)
        cells = (f"{r['seconds'] * 1e3:.1f}, {r['exposed'] * 1e3:.2f}, {r['efficiency']:.1%}" for r in sizes)
        rows.append((name, f"{mode['weak'][str(NODE)]['sent'] / 1e6:,.0f}", *cells, verdict(mode["below"])))
    compute = result["compute"]
    what = f"**{result['preset']}, {compute['samples']:,} samples a GPU: {compute['seconds'] * 1e3:.1f} ms on one**"
    rows.append((what, "-", compute["source"], "-", "-", "-"))
    traffic = result.get("traffic") or {"rows": {}}
    for name, row in traffic["rows"].items():
        sent, expected, ring = (row[part] / 1e6 for part in ("sent", "expected", "ring"))
        by = f"{expected:,.3f} by the formula" + (f" ({ring:,.3f} on a ring)" if ring != expected else "")
        what = f"{traffic['processes']} gloo processes, counted: {name}"
        rows.append((what, f"{sent:,.3f}", by, f"{row['ratio']:.3f}x", "-", "-"))
    return rows


def training_rows(run: dict) -> Rows:
    minutes, rate = f"{run['train_seconds'] / 60:.1f}", f"{run['tokens_per_s']:,.0f}"
    head = ("run", "sees", "blind", "minutes", "steps", "tokens/s", "budget filled", "waiting for data")
    shares = (f"{run['sees']:.1%}", f"{run['blind']:.1%}")
    rest = (f"{run['steps']:,}", rate, f"{run['packing']:.1%}", f"{run['data_wait']:.1%}")
    return [head, (f"`{run['train_command']}`", *shares, minutes, *rest)]


def optimizers_rows(result: dict) -> Rows:
    rows: Rows = [("seed", "AdamW's last loss", "its steps", "Muon's steps to it", "Muon's last loss")]
    for row in result["verdict"]:
        muon = f"{row['muon_steps']:,}" if row["muon_steps"] else "never"
        rows.append((str(row["seed"]), f"{row['loss']:.4f}", f"{row['steps']:,}", muon, f"{row['muon_loss']:.4f}"))
    return rows


def curves_rows(result: dict) -> Rows:
    rows: Rows = [("variant", "seed", "furthest from the reference's loss", "the seeds there", "share")]
    for row in result["rows"]:
        numbers = (f"{row['difference']:.1e}", f"{row['spread']:.1e}", f"{row['share']:.1%}")
        rows.append((row["variant"], str(row["seed"]), *numbers))
    return rows


def timed_rows(result: dict) -> Rows:
    """Any other suite: everything in its file that has a median."""
    rows: Rows = [("measurement", "ms (quartiles)")]
    for path, row in measurements(result):
        rows.append((" · ".join(path), ms(row) if "lower_quartile" in row else f"{row['median'] * 1e3:,.3g}"))
    return rows


@dataclass(frozen=True)
class Section:
    """Result files by the beginning of their name, what they are, and the table they become.

    A section that is `promised` says so where there is no file yet.
    """

    stem: str
    about: str
    rows: Callable[[dict[str, Any]], Rows] = timed_rows
    promised: bool = False


SCALING = """What communication costs: a model of an H100's step on 1 to 1,024 GPUs, not a measurement of more than one,
and the bytes that two gloo processes really send, which check its accounting. `bench/scaling.py` says what is modelled
and what is left out; its command prints all numbers of GPUs, and a fixed number of samples in all. "No overlap" is what
a backward compiled to one graph gets. FSDP2 may pass 100%: it divides the optimizer's update too. gloo's reduce-scatter
sends what an all-reduce sends, twice a ring's."""
STEP = """One optimizer step on the same samples: padded nanoVLM against ours, and ours without each of its techniques.

Rows are timed in pairs, each in turn with the base. "Of the base's time" is the ratio of the medians within the pair,
with its interval where the file keeps the times of both; "speed", against the reference, goes through the base, and has
an interval only where base and reference are that pair."""
RACE = """From random weights to 95% of easy-VQA's test split, seconds of training: padded nanoVLM against ours.

Both take the same batches with the same optimizer from the same weights, so what differs is the cost of a step."""
SECTIONS = (
    Section("race", RACE, race_rows, promised=True),
    Section("train_step", STEP, train_step_rows),
    Section("train_tiny", "Whole runs of `train.py`: the test split, seeing and blind.", training_rows),
    Section("loss_curves", "The same training four ways, against what a seed changes.", curves_rows),
    Section("kernels", "Each kernel beside its rivals, at the seed's sizes.", kernels_rows),
    Section("attention", "Attention backends over documents of several lengths.", attention_rows),
    Section("memory", "Peak memory of a step against samples a step.", memory_rows),
    Section("dataloader", "From images and text to packed batches.", dataloader_rows),
    Section("generate", "Greedy generation on the same weights.", generate_rows),
    Section("peer", "huggingface/nanoVLM's own code beside ours: the same weights and samples.", peer_rows),
    Section("roofline", "The least time of a step, by the machine's own rates.", roofline_rows),
    Section("scaling", SCALING, scaling_rows),
    Section("profile", "One of our steps, kernel by kernel, as the device runs it.", profile_rows),
    Section("facts", "What the device can do, before anything is measured on it.", facts_rows),
    Section("tests", "`pytest -m gpu` on the device.", check_rows),
    Section("optimizers", "Muon against AdamW over seeds, to the same loss.", optimizers_rows),
)


def suites_page(results: Path = ROOT) -> str:
    """The results of bench/README.md: a section a suite, a table a file, and the pictures of its device."""
    parts = []
    drawn = [figure for folder in devices(results) for figure in figures(folder)]
    for section in SECTIONS:
        files = sorted(results.glob(f"*/{section.stem}*.json"))
        if not files:
            parts += [f"### {section.stem}\n\n{section.about}\n\nNot measured yet."] if section.promised else []
            continue
        parts.append(f"### {section.stem}\n\n{section.about}")
        for file in files:
            result = load(file)
            notes = "; ".join(result.get("machine", {}).get("warnings", ()))
            origin = f"{kind(result)} timings: {result['device']}" if kind(result) else result["device"]
            source = f"[{result['commit'][:7]}, {result['date'][:10]}]({os.path.relpath(file, ROOT.parent)})"
            parts.append(f"**{origin}** · {source} · `{result['command']}`" + (f" · {notes}" if notes else ""))
            rows = [("no time", "")] if result.get("small") else section.rows(result)
            parts.append(markdown(rows) if len(rows) > 1 else "A rehearsal, or nothing that was timed.")
        parts += [picture(figure) for figure in drawn if figure.sources[0] in files]
        parts += [own_picture(file) for file in files if section.stem == "loss_curves" and own(file).exists()]
    return "\n\n".join(parts)


def kind(result: dict) -> str:
    """'CPU' or 'GPU'; empty for what was timed on neither."""
    if result["device"].startswith("none") or not result.get("timed", True):
        return ""
    return "GPU" if "NVIDIA" in result["device"] else "CPU"


def devices(results: Path) -> list[Path]:
    return sorted(folder for folder in results.iterdir() if folder.is_dir())


def own(file: Path) -> Path:
    """The picture that bench.loss_curves draws beside its file, which rounds away the differences shown."""
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
    """`text` with what stands between the marks replaced. Raises ValueError if the marks are missing."""
    first, last = marks(name)
    start, end = text.find(first), text.find(last)
    if start < 0 or end < start:
        raise ValueError(f"a README has lost the marks around its {name} table")
    return f"{text[: start + len(first)]}\n{written}\n{text[end:]}"


def page(file: Path) -> str:
    """The page with all its tables anew."""
    text = file.read_text()
    for name, make in TABLES[file].items():
        text = updated(text, make(), name)
    return text


def stale_pictures(results: Path = ROOT) -> tuple[list[Figure], list[Path]]:
    """Pictures to draw, and files of pictures that no result calls for any more."""
    drawn = [figure for folder in devices(results) for figure in figures(folder)]
    wanted = {figure.file(theme) for figure in drawn for theme in THEMES}
    there = {file for theme in THEMES for file in results.glob(f"*/*_{theme}.png") if source_of(file)}
    return [figure for figure in drawn if figure.stale()], sorted(there - wanted)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if something would change")
    args = parser.parse_args(argv)
    try:
        after = {file: page(file) for file in TABLES}
        to_draw, left_over = stale_pictures()
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 1
    stale = [file for file, text in after.items() if text != file.read_text()]
    if args.check:
        for file in (*stale, *(figure.file("light") for figure in to_draw), *left_over):
            print(f"{file} is out of date with bench/results: run python -m bench.report", file=sys.stderr)
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
