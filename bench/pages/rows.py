"""Result files as rows of tables."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from bench.dataloader import RATE, workers_for
from bench.harness.results import ROOT, load, measurements
from bench.harness.tables import Rows, markdown
from bench.harness.timing import Difference, difference
from bench.kernels import against_compile
from bench.scaling import GPUS, NODE, reach
from bench.subjects.operators import ALL, NOTHING


# ---- kernels/README.md
def kernel_table(results: Path = ROOT) -> str:
    """The table of kernels/README.md: least work, the assembler's resources, GPU times if any."""
    resources = "registers, shared memory, warps, occupancy on sm_90"
    saved = "alone takes out of the step"
    rows: Rows = [("file, tests", "what it does", "forward; backward", saved, resources, "GPU")]
    compiled = [
        row for file in results.glob("sm-90-*/codegen.json") for row in load(file)["kernels"]
    ]
    for kernel in ALL:
        about = (kernel.module.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()
        cost = kernel.module.cost(**kernel.sizes, dtype=torch.bfloat16)
        passes = [cost[part] for part in ("forward", "backward")]
        work = "; ".join(f"{b / 1e6:,.0f} MB, {flops / 1e9:,.1f} GFLOP" for b, flops in passes)
        launches = resources_of([row for row in compiled if row["op"] == kernel.name])
        name = f"`{kernel.name}.py`, [tests](../tests/kernels/test_{kernel.name}.py)"
        times = gpu_times(kernel.name, results)
        rows.append((name, about, work, saved_by(kernel.name, results), launches, times))
    return markdown(rows)


def saved_by(name: str, results: Path) -> str:
    """What the compiled step of nanovlm-222m moves less with this kernel alone, and its floor."""
    for file in results.glob("sm-90-*/compiled_step.json"):
        variants = load(file)["variants"]
        if (ours := variants.get(f"kernels {name}")) and (plain := variants.get("kernels none")):
            less = {part: plain[part] - ours[part] for part in ("read_gb", "written_gb")}
            floor = plain["floor_ms"] - ours["floor_ms"]
            launches = plain["launches"] - ours["launches"]
            return f"{sum(less.values()):.1f} GB, {floor:.2f} ms, {launches:,} launches"
    return "-"


def resources_of(rows: list[dict]) -> str:
    """One line per kernel: what its cases take, from the least to the most."""
    lines = []
    for name in dict.fromkeys(row["kernel"] for row in rows):
        cases = [row for row in rows if row["kernel"] == name]
        registers = span([row["registers"] for row in cases], "{}")
        shared = span([row["shared"] / 1024 for row in cases], "{:.0f}")
        warps = span([row["warps"] for row in cases], "{}")
        share = span([100 * row["occupancy"] for row in cases], "{:.0f}")
        lines.append(f"`{name.strip('_')}` {registers}, {shared} KB, {warps}, {share}%")
    return "<br>".join(lines) or "-"


def span(values: list[float], form: str) -> str:
    """The least and the most of `values` as 1-3, or 1 if they look the same."""
    ends = [form.format(end) for end in (min(values), max(values))]
    return "-".join(dict.fromkeys(ends))


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
    head = (
        "kernel",
        "provider",
        "forward us",
        "backward us",
        "both us",
        "forward, share of a copy's rate",
    )
    rows: Rows = [(*head, "speed relative to torch.compile")]
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
    head = (
        "documents",
        "backend",
        "forward us",
        "backward us",
        "both us",
        "GFLOP/s",
        "share of padded's time",
    )
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
    head = ("stage, or workers of the loader", "on the fly, samples/s")
    rows: Rows = [(*head, "prepared, samples/s", "speed-up")]
    rows += [(stage, f"{rate:,.0f}", "-", "-") for stage, rate in result["stages"].items()]
    for workers, gain in result["speedup"].items():
        ways = (result["samples_per_s"][way] for way in ("on the fly", "prepared"))
        rates = (f"{way[workers]:,.0f}" for way in ways)
        rows.append((f"{workers} worker{'s' * (workers != '1')}", *rates, f"{gain:.2f}x"))
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
    rates, counts, floor = (result[part] for part in ("rates", "work", "floor_seconds"))
    rows: Rows = [("floor of a step", "ms", "share")]
    for kind, seconds in sorted(result["by_kind"].items(), key=lambda item: -item[1]):
        rows.append((kind, f"{seconds * 1e3:,.2f}", f"{seconds / floor:.1%}"))
    what = f"**{result['preset']}, {counts['images']:,} images, {counts['tokens']:,} tokens at"
    what += f" {rates['flops'] / 1e12:.3g} TFLOP/s and {rates['bandwidth'] / 1e9:,.0f} GB/s**"
    rows.append((what, f"**{floor * 1e3:,.1f}**", f"{result['samples_per_s']:,.0f} samples/s"))
    return rows


def scaling_rows(result: dict) -> Rows:
    shown = (str(NODE), "64", str(GPUS[-1]))
    heads = (f"{int(gpus):,} GPUs: ms per step, ms exposed, efficiency" for gpus in shown)
    sent = f"MB sent per GPU ({NODE} GPUs)"
    rows: Rows = [("gradients", sent, *heads, f"below {result['enough']:.0%}")]
    for name, mode in result["modes"].items():
        sizes = (mode["weak"][gpus] for gpus in shown)
        cells = (
            f"{r['seconds'] * 1e3:.1f}, {r['exposed'] * 1e3:.2f}, {r['efficiency']:.1%}"
            for r in sizes
        )
        sent = f"{mode['weak'][str(NODE)]['sent'] / 1e6:,.0f}"
        rows.append((name, sent, *cells, reach(mode["below"])))
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


def compiled_step_rows(result: dict) -> Rows:
    """A row per variant. Milliseconds are predictions, by kind of launch."""
    kinds = ("product", "attention", "generated", "kernel", "other")
    heads = ("products", "attention", "generated kernels", "our kernels", "optimizer and others")
    head = ("variant", "launches", "GB", "floor ms", *(f"{name}, ms" for name in heads))
    rows: Rows = [(*head, "predicted ms", "tokens/s", "MFU")]
    for label, row in result["variants"].items():
        moved = f"{row['read_gb'] + row['written_gb']:.1f}"
        sums = row["by_kind"]["all"]
        times = (f"{sums[k]['expected_ms']:.1f}" if k in sums else "-" for k in kinds)
        predicted = row["predicted"]
        rates = (f"{predicted['tokens_per_s']:,.0f}", f"{predicted['mfu']:.1%}")
        cells = (f"{row['launches']:,}", moved, f"{row['floor_ms']:.1f}", *times)
        rows.append((label, *cells, f"**{row['expected_ms']:.1f}**", *rates))
    return rows


def training_rows(run: dict) -> Rows:
    head = ("run", "sees", "blind", "minutes", "steps", "tokens/s", "budget filled")
    shares = (f"{run['sees']:.1%}", f"{run['blind']:.1%}", f"{run['train_seconds'] / 60:.1f}")
    rates = (f"{run['steps']:,}", f"{run['tokens_per_s']:,.0f}")
    rest = (f"{run['packing']:.1%}", f"{run['data_wait']:.1%}")
    return [(*head, "time waiting for data"), (f"`{run['train_command']}`", *shares, *rates, *rest)]


def demo_rows(run: dict) -> Rows:
    """A row per kind of question."""
    rows: Rows = [("question", "sees", "blind", "questions")]
    for kind, row in run["by_kind"].items():
        shares = (f"{row['accuracy']:.1%}", f"{run['blind_by_kind'][kind]['accuracy']:.1%}")
        rows.append((kind, *shares, f"{row['questions']:,}"))
    whole = (f"{run['sees']:.1%}", f"{run['blind']:.1%}", f"{run['questions']:,}")
    minutes = f"{run['train_seconds'] / 60:.1f} minutes, {run['steps']:,} steps"
    return [*rows, (f"all, after {minutes}", *whole)]


def optimizers_rows(result: dict) -> Rows:
    head = (
        "seed",
        "AdamW's last loss",
        "its steps",
        "Muon's steps to that loss",
        "Muon's last loss",
    )
    rows: Rows = [head]
    for row in result["verdict"]:
        muon = f"{row['muon_steps']:,}" if row["muon_steps"] else "never"
        losses = (f"{row['loss']:.4f}", f"{row['muon_loss']:.4f}")
        rows.append((str(row["seed"]), losses[0], f"{row['steps']:,}", muon, losses[1]))
    return rows


def curves_rows(result: dict) -> Rows:
    head = (
        "variant",
        "seed",
        "largest distance from the reference's loss",
        "spread of seeds there",
        "share",
    )
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
