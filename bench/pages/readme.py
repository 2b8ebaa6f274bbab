"""The tables of the READMEs from the committed result files; `bench.report` writes them.

`highlights` goes to README.md, `overview` to bench/README.md, and `scale` and `reliability` go to
nanovlm_fast/training/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench.harness.results import ROOT, load
from bench.harness.tables import Rows, markdown
from bench.harness.timing import difference
from bench.loss_curves import VARIANTS
from bench.pages.race import outcome


def overview(results: Path = ROOT) -> str:
    """The summary of bench/README.md: for each kind of measurement, the newest on each device."""
    rows: Rows = [("what", "measured", "on", "commit", "command")]
    for run in newest(results, "train_tiny*"):
        rows.append(run_row(run))
        if run["options"]:  # runs with another seed or length: one row is enough
            continue
        packing = f"{run['packing']:.1%} filled"
        packing += f"; {run['data_wait']:.1%} of the time waiting for data"
        rows.append(("its token budget", packing, run["device"], run["commit"][:7], "the same run"))
    rows += [split_row(run) for run in newest(results, "tiny_split")]
    rows += [demo_row(run) for run in newest(results, "demo")]
    rows += [race_row(race) for race in newest(results, "race*")]
    # A call that was stopped before ours had a time has nothing to say here.
    steps = [step for step in newest(results, "train_step*") if "parity" in step]
    rows += [step_row(step) for step in steps]
    rows += [peer_row(peer) for peer in newest(results, "peer*")]
    rows += [curves_row(run) for run in newest(results, "loss_curves*")]
    rows += [loader_row(loader) for loader in newest(results, "dataloader")]
    return markdown(rows)


def highlights(results: Path = ROOT) -> str:
    """The rows of README.md: three runs, a step on a GPU, nanoVLM's own code and ours, the loader.

    They leave out the commits, which `overview` has.
    """
    rows: Rows = [("what", "measured", "on", "commit", "command")]
    rows += [run_row(run) for run in newest(results, "train_tiny")]
    rows += [split_row(run) for run in newest(results, "tiny_split")]
    rows += [demo_row(run) for run in newest(results, "demo")]
    steps = [s for s in newest(results, "train_step_nanovlm-222m") if {"parity", "driver"} <= {*s}]
    rows += [step_row(step) for step in steps]
    rows += [peer_row(peer) for peer in newest(results, "peer_nanovlm-222m*")]
    rows += [loader_row(loader) for loader in newest(results, "dataloader")]
    return markdown([(what, measured, on, command) for what, measured, on, _, command in rows])


def predictions(results: Path = ROOT) -> str:
    """The table of README.md that was not measured: the compiled step, plain and with kernels."""
    head = ("nanovlm-222m, one H100", "ms per step", "tokens/s", "MFU", "launches", "GB moved")
    rows: Rows = [head]
    for result in newest(results, "compiled_step"):
        for label in ("kernels none", "kernels all"):
            if (row := result["variants"].get(label)) is None:
                continue
            predicted = row["predicted"]
            rates = (f"{predicted['tokens_per_s']:,.0f}", f"{predicted['mfu']:.0%}")
            moved = f"{row['read_gb'] + row['written_gb']:.0f}"
            step = f"{row['expected_ms']:.0f} predicted"
            rows.append((f"`--{label}`", step, *rates, f"{row['launches']:,}", moved))
    return markdown(rows)


def run_row(run: dict) -> tuple[str, ...]:
    """A result of bench.train_run."""
    what = f"easy-VQA test split, {run['questions']:,} questions, exact match by generation"
    sight = f"sees **{run['sees']:.1%}** · blind {run['blind']:.1%}"
    minutes = f"{run['train_seconds'] / 60:.1f} min of training"
    return (
        what,
        f"{sight}, {minutes}",
        run["device"],
        run["commit"][:7],
        f"`{run['train_command']}`",
    )


def split_row(result: dict) -> tuple[str, ...]:
    """A result of bench.tiles.legible."""
    tiles = result["tiles"]
    square = result["square"]
    what = (
        f"`tiny-split`: easy-VQA on large canvases, {tiles['questions']:,} questions, exact match"
    )
    seen = f"in tiles **{tiles['sees']:.1%}** · squashed {square['sees']:.1%}"
    blind = f"blind {tiles['blind']:.1%}, {tiles['train_seconds'] / 60:.1f} min of training"
    command = f"`{result['command']}`"
    return what, f"{seen} · {blind}", result["device"], result["commit"][:7], command


def demo_row(run: dict) -> tuple[str, ...]:
    """A run of the demo: the group of what was in no drawing that it was trained on."""
    kind = "group, emoji never seen"
    sees = run["by_kind"][kind]
    blind = run["blind_by_kind"][kind]["accuracy"]
    what = "DINOv2 and SmolLM2 fine-tuned on emoji: which of 5 groups one is in that it never saw"
    sight = f"sees **{sees['accuracy']:.1%}** of {sees['questions']} · blind {blind:.1%}"
    minutes = f"{run['train_seconds'] / 60:.0f} min of training"
    command = f"`{run['train_command']}`"
    return what, f"{sight}, {minutes}", run["device"], run["commit"][:7], command


def loader_row(loader: dict) -> tuple[str, ...]:
    """A result of bench.dataloader, each way with its best number of workers."""
    rates = loader["samples_per_s"]
    few, slow = max(rates["on the fly"].items(), key=lambda item: item[1])
    best, fast = max(rates["prepared"].items(), key=lambda item: item[1])
    what = "data loader, photographs of 640 x 480, best number of workers: "
    what += "prepared shards against decoding"
    measured = f"**{fast / slow:.1f}x**: {fast:,.0f} ({best} workers)"
    measured += f" against {slow:,.0f} samples/s ({few} workers)"
    return what, measured, loader["device"], loader["commit"][:7], "`python -m bench.dataloader`"


def newest(results: Path, pattern: str) -> list[dict]:
    """Of the result files with one name, the newest on a GPU; on a CPU where there is none."""
    found: dict[tuple[str, bool], dict] = {}
    for file in sorted(results.glob(f"*/{pattern}.json")):
        result = load(file)
        key = file.stem, "driver" in result
        if key not in found or result["date"] > found[key]["date"]:
            found[key] = result
    return [
        result
        for (name, on_gpu), result in sorted(found.items())
        if on_gpu or (name, True) not in found
    ]


def race_row(race: dict) -> tuple[str, ...]:
    """A result of bench.race."""
    what = f"`{race['preset']}` from scratch to {race['target']:.0%} of easy-VQA's test split"
    what += ", ours against padded"
    return what, outcome(race), race["device"], race["commit"][:7], f"`{race['command']}`"


def step_row(step: dict) -> tuple[str, ...]:
    """A result of bench.train_step: ours against the reference, also against it compiled."""
    theirs = step["variants"].get("reference", {})
    variants = step["variants"]
    # `graphs` is ours before CUDA graphs, all that a run has that was stopped; `packed` is older.
    ours = variants.get("ours") or variants.get("graphs") or variants["packed"]
    depth = step.get("layers", 0)
    layers = f" cut to {depth} layer{'s' * (depth > 1)} per tower" if depth else ""
    questions = step["work"]["questions"]
    what = f"optimizer step of `{step['preset']}`{layers} on the same {questions:,} questions"
    what += ", against padded"

    def both(name: str, form: Callable[[float], str]) -> str:
        return " against ".join(form(row[name]) if name in row else "-" for row in (ours, theirs))

    compiled = step.get("speedup_over_compiled")
    gain = f"**{step['speedup']:.1f}x**" if "speedup" in step else "-"
    gain += f" ({compiled:.1f}x with the reference compiled)" if compiled else ""
    questions_per_s = both("questions_per_s", lambda rate: f"{rate:,.{1 if rate < 100 else 0}f}")
    gain += f": {questions_per_s} questions/s"
    gain += f", MFU {both('mfu', '{:.1%}'.format)}" if "mfu" in ours else ""
    gain += f", {both('peak_mib', '{:,.0f}'.format)} MiB"
    gain += f"; gradients agree to {step['parity']['gradient']:.0e}"
    return what, gain, step["device"], step["commit"][:7], f"`{step['command']}`"


def shown_command(result: dict) -> str:
    """The command of a result, without the path of a checkout on the machine that ran it."""
    return re.sub(r"(--nanovlm) \S+", r"\1 CHECKOUT", result["command"])


def cut_to(layers: int) -> str:
    """Says after a preset's name that its towers were cut; empty if they were not."""
    return f" cut to {layers} layer{'s' * (layers > 1)} per tower" if layers else ""


def peer_row(peer: dict) -> tuple[str, ...]:
    """A result of bench.peer: the plain case beside the others."""
    layers = cut_to(peer["layers"])
    what = f"optimizer step of `{peer['preset']}`{layers}, huggingface/nanoVLM's own code "
    what += f"({peer['nanovlm']['commit']})"
    what += " and ours, interleaved: questions/s of ours over theirs"
    cases = []
    for name, case in peer["cases"].items():
        gain = difference(*(case["variants"][who]["seconds"] for who in ("ours", "nanovlm")))
        waste = case["work"]["padded_waste"]
        rows = f" ({waste:.0%} of their rows are padding)" if waste >= 0.005 else ""
        cases.append(f"{name}{rows} **{gain.ratio:.2f}x** ({gain.low:.2f}-{gain.high:.2f})")
    return what, "; ".join(cases), peer["device"], peer["commit"][:7], f"`{shown_command(peer)}`"


def curves_row(run: dict) -> tuple[str, ...]:
    """A result of bench.loss_curves."""
    what = f"loss of `{run['preset']}`{cut_to(run.get('layers', 0))} over {run['steps']} steps, "
    what += "largest distance from the padded "
    what += f"float32 reference, as a share of what {run['seeds']} seeds differ by within "
    what += f"{run['smoothing']} steps"
    parts = []
    for variant in (*VARIANTS[2:], VARIANTS[1]):  # ours first; an older result has fewer
        shares = [row["share"] for row in run["rows"] if row["variant"] == variant]
        if shares:
            parts.append(f"{variant} **{max(shares):.1%}**")
    return what, " · ".join(parts), run["device"], run["commit"][:7], f"`{run['command']}`"


SHOWN_MODES = (
    "DDP float32, overlapped, ring or tree",
    "DDP float32, no overlap, ring or tree",
    "FSDP2 float32, overlapped",
)


def scale(results: Path = ROOT) -> str:
    """What communication costs: efficiencies by the model, and counted bytes of a step."""
    rows: Rows = [("what", "figure", "command")]
    for result in newest(results, "scaling"):
        compute = result["compute"]
        traffic = (result.get("traffic") or {"rows": {}})["rows"]
        kind = "measured" if compute["measured"] else compute["source"]
        command = f"`{result['command']}`"
        for name in SHOWN_MODES:
            mode = result["modes"][name]
            shares = {n: mode["weak"][n]["efficiency"] for n in ("8", "64", "1024")}
            sizes = " · ".join(f"{int(n):,} GPUs {share:.1%}" for n, share in shares.items())
            below = f"from {mode['below']:,} GPUs on" if mode["below"] else "never up to 1,024"
            figure = f"{sizes}; below {result['enough']:.0%}: {below}"
            rows.append((f"model: efficiency, {name}", figure, command))
        step = f"{compute['seconds'] * 1e3:.1f} ms at {compute['samples']:,} samples per GPU"
        step += f" ({kind})"
        rows.append(("the step that the model rests on", step, command))
        for name in ("DDP", "DDP, 4 micro-steps", "FSDP"):
            if name in traffic:
                row = traffic[name]
                what = f"counted: bytes that 2 gloo processes send per step, {name}"
                sent = f"{row['sent'] / 1e6:.3f} MB, {row['ratio']:.3f}x the formula"
                rows.append((what, sent, command))
    return markdown(rows) if len(rows) > 1 else "Not measured yet."


def reliability(results: Path = ROOT) -> str:
    """Kills that were survived, and what a long run holds."""
    rows: Rows = [("what", "measured", "on", "commit", "command")]
    for result in newest(results, "reliability"):
        where = result["device"], result["commit"][:7], f"`{result['command']}`"
        for row in result["kills"]:
            what = f"{row['kills']} kills of a run of {row['steps']} steps in {row['processes']}"
            what += " processes" if row["processes"] > 1 else " process"
            again = row["steps_repeated"]
            found = f"losses equal: **{'yes' if row['losses_equal'] else 'no'}**; "
            found += f"{row['in_a_save']} in a save; "
            found += f"steps repeated after a kill: {again['median']:g}, at most {again['most']}"
            rows.append((what, found, *where))
        if soak := result.get("soak"):
            growth = soak["growth"]
            what = f"{soak['steps']:,} steps of `tiny` with {soak['resumes']} resumes: growth"
            found = f"host memory **{growth['host_bytes']:+.1%}**, files {growth['files']:+.1%}, "
            found += f"processes {growth['children']:+.1%}, threads {growth['threads']:+.1%}"
            rows.append((what, found, *where))
    return markdown(rows) if len(rows) > 1 else "Not measured yet."
