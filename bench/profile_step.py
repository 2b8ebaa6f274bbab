"""Where the time of one of our steps goes, kernel by kernel, compiled as train.py compiles it.

    python -m bench.profile_step --preset nanovlm-222m          batch 256 on a GPU
    python -m bench.profile_step --reference --trace            the padded reference; a trace
    python -m bench.profile_step --kernels all --name profile_all       another set of kernels

`bench.roofline --measure` sums the uncompiled step by kind, to compare it with the floor; this
suite shows the step as it runs. `idle` is the share of a step, timed without the profiler, in which
no kernel ran: launches, waiting, the host. On a CPU the rows are PyTorch's operators.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.harness.results import place, write
from bench.harness.tables import Rows, lined_up
from bench.harness.timing import interleave, summary, synchronize
from bench.roofline import kind_of
from bench.subjects.operators import ALL
from bench.subjects.variants import Packed, Padded, Recipe, Step, Workbench
from bench.subjects.workload import load_work
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import make_current, pick_device, pick_dtype
from nanovlm_fast.model.attention import VISION_BACKENDS
from nanovlm_fast.ranges import Range

KINDS = {  # kind -> what the names of its kernels contain; the first that matches
    "attention": ("flash", "fmha", "attention", "attn"),
    "product": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "optimizer": ("adam", "multi_tensor"),
    "copy": ("memcpy", "memset"),
}
OURS = tuple(f"_{kernel.name}" for kernel in ALL)
# Spans around kernels that have rows of their own; counting both would double their time.
REGIONS = ("Optimizer.", "ProfilerStep", "Torch-Compiled", "## ")
KEPT = 60  # rows in the result file


def kernel_kind(name: str) -> str:
    """The kind of a kernel, by its name."""
    # First: Inductor lists what it fused in the name, which would match other kinds below.
    if name.startswith("triton_"):
        return "compiled"
    if name.startswith(OURS):
        return "ours"
    lower = name.lower()
    for kind, parts in KINDS.items():
        if any(part in lower for part in parts):
            return kind
    return "other"


def make_step(args: argparse.Namespace, device: torch.device) -> Step:
    work = load_work(args.preset, args.data, args.samples, args.layers, device.type == "cuda")
    bench = Workbench(work, device, pick_dtype("auto", device))
    if args.reference:
        return Padded(bench)
    recipe = Recipe(
        compile=args.compile, kernels=args.kernels, vision_attention=args.vision_attention
    )
    return Packed(bench, recipe)


def profiled_rows(
    step: Step, device: torch.device, steps: int, trace_file: Path | None
) -> list[dict]:
    """One row per kernel (on a CPU per operator): name, kind, calls and seconds per step.

    The most expensive ones come first.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(steps):
            step()
        synchronize()  # inside the profiler, which otherwise misses the kernels still queued
    if trace_file:
        trace_file.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(trace_file))
    rows = []
    for event in trace.key_averages():
        if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        annotation = getattr(event, "is_user_annotation", False) or event.key.startswith(REGIONS)
        if time > 0 and not annotation:
            row = {
                "name": event.key[:200],
                "kind": kernel_kind(event.key) if on_gpu else kind_of(event.key),
                "calls": event.count / steps,
                "seconds": time / steps / 1e6,
            }
            rows.append(row)
    return sorted(rows, key=lambda row: -row["seconds"])


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    """The content of the result file; with --trace also a trace in logs/ beside the results."""
    step = make_step(args, device)
    timed = summary(interleave({"step": step}, args.repeats, warmup=3)["step"])
    logs = place("", device, args.out).parent.parent / "logs"
    trace_file = logs / f"{name_of(args)}_trace.json.gz"
    rows = profiled_rows(step, device, args.steps, trace_file if args.trace else None)
    busy = sum(row["seconds"] for row in rows)
    kinds: dict[str, float] = defaultdict(float)
    for row in rows:
        kinds[row["kind"]] += row["seconds"]
    return {
        "preset": args.preset,
        "layers": args.layers,
        "variant": "reference" if args.reference else "ours",
        "compile": "none" if args.reference else args.compile,
        "kernel_option": "none" if args.reference else args.kernels,
        "step": timed,
        "busy_seconds": busy,
        # Kernels may overlap on two streams, and then their sum exceeds the step.
        "idle": max(0.0, 1 - busy / timed["median"]) if device.type == "cuda" else None,
        "by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": rows[:KEPT],
        "kernels_in_all": len(rows),
    }


def profile_rows(result: dict) -> Rows:
    """The table of bench/README.md: the kinds, then the ten most expensive kernels."""
    busy = result["busy_seconds"]
    rows: Rows = [("kernel", "kind", "calls per step", "ms per step", "share")]
    for kind, seconds in result["by_kind"].items():
        rows.append(("all", kind, "-", f"{seconds * 1e3:,.2f}", f"{seconds / busy:.1%}"))
    for row in result["kernels"][:10]:
        name = row["name"] if len(row["name"]) <= 60 else f"{row['name'][:57]}..."
        calls = f"{row['calls']:,.0f}"
        time = f"{row['seconds'] * 1e3:,.2f}"
        share = f"{row['seconds'] / busy:.1%}"
        rows.append((f"`{name.replace('`', '')}`", row["kind"], calls, time, share))
    if result["idle"] is not None:
        time = f"{result['idle'] * result['step']['median'] * 1e3:,.2f}"
        rows.append(("no kernel", "idle", "-", time, "-"))
    return rows


def name_of(args: argparse.Namespace) -> str:
    return args.name or ("profile_reference" if args.reference else "profile")


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", default="", help="as bench.train_step's")
    parser.add_argument(
        "--samples",
        type=Range(int),
        default=0,
        help="per step; 0: 256 on a GPU, 16 on a CPU, 32 of a data set",
    )
    parser.add_argument(
        "--layers", type=Range(int), default=0, help="of each tower, at full width; 0: the preset's"
    )
    parser.add_argument(
        "--reference", action="store_true", help="profile the padded reference instead of ours"
    )
    parser.add_argument(
        "--compile", default="auto", choices=("auto", "none", "default", "reduce-overhead")
    )
    parser.add_argument("--kernels", default="auto", help="as train.py's")
    parser.add_argument(
        "--vision-attention",
        default="auto",
        choices=("auto", *VISION_BACKENDS),
        help="as train.py's",
    )
    parser.add_argument("--steps", type=Range(int, least=1), default=2, help="under the profiler")
    parser.add_argument(
        "--repeats", type=Range(int, least=1), default=10, help="timed steps without it"
    )
    parser.add_argument(
        "--trace", action="store_true", help="also write the trace to logs/NAME_trace.json.gz"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="", help="of the result; default: profile")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = make_current(pick_device(args.device))
    # `default` and not graphs: in a replay, kernels are not attributed to what launched them.
    if args.compile == "auto":
        args.compile = "default" if device.type == "cuda" else "none"
    result = measure(args, device)
    file = write(name_of(args), device, result, args.out)
    print(lined_up(profile_rows(result), left=(0, 1)))
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
