"""Where the time of one of our steps goes, kernel by kernel, as the device runs them: compiled as train.py compiles.

    python -m bench.profile_step --preset nanovlm-222m          batch 256 on a GPU
    python -m bench.profile_step --reference --trace            the padded reference; and a trace for Perfetto

`bench.roofline --measure` sums the uncompiled step by kind, to hold it against the floor; this is the step as it runs.
`idle` is the share of a step, timed without the profiler, in which no kernel ran: launches, waiting, the host. On a CPU
the rows are PyTorch's operators.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.registry import KERNELS
from bench.results import place, write
from bench.roofline import kind_of
from bench.timing import interleave, summary, synchronize
from bench.variants import Packed, Padded, Recipe, Step, Workbench
from bench.workload import load_work
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device, pick_dtype
from nanovlm_fast.ranges import Range

KINDS = {  # kernels of the device by what their names hold -> kind; the first that fits
    "attention": ("flash", "fmha", "attention", "attn"),
    "product": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "optimizer": ("adam", "multi_tensor"),
    "copy": ("memcpy", "memset"),
}
OURS = tuple(f"_{kernel.name}" for kernel in KERNELS)
REGIONS = ("Optimizer.", "ProfilerStep", "Torch-Compiled", "## ")  # spans over kernels that have rows of their own
KEPT = 60  # rows of the result file


def kernel_kind(name: str) -> str:
    if name.startswith("triton_"):  # the compiler's; what it fused is in the name and would look like the rest
        return "compiled"
    if name.startswith(OURS):
        return "ours"
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "other")


def make_step(args: argparse.Namespace, device: torch.device) -> Step:
    work = load_work(args.preset, args.data, args.samples, args.layers, device.type == "cuda")
    bench = Workbench(work, device, pick_dtype("auto", device))
    return Padded(bench) if args.reference else Packed(bench, Recipe(compile=args.compile, kernels=args.kernels))


def profiled_rows(step: Step, device: torch.device, steps: int, trace_file: Path | None) -> list[dict]:
    """One row a kernel (on a CPU an operator): name, kind, calls and seconds of one step; dearest first."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        for _ in range(steps):
            step()
        synchronize()
    if trace_file:
        trace_file.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(trace_file))
    rows = []
    for event in trace.key_averages():
        if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time > 0 and not getattr(event, "is_user_annotation", False) and not event.key.startswith(REGIONS):
            kind = kernel_kind(event.key) if on_gpu else kind_of(event.key)
            row = {"name": event.key[:200], "kind": kind, "calls": event.count / steps, "seconds": time / steps / 1e6}
            rows.append(row)
    return sorted(rows, key=lambda row: -row["seconds"])


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    step = make_step(args, device)
    timed = summary(interleave({"step": step}, args.repeats, warmup=3)["step"])
    trace_file = place("", device, args.out).parent.parent / "logs" / f"{name_of(args)}_trace.json.gz"
    rows = profiled_rows(step, device, args.steps, trace_file if args.trace else None)
    busy, kinds = sum(row["seconds"] for row in rows), Counter()
    for row in rows:
        kinds[row["kind"]] += row["seconds"]
    idle = max(0.0, 1 - busy / timed["median"]) if device.type == "cuda" else None
    by_kind = dict(kinds.most_common())
    return {
        "preset": args.preset, "layers": args.layers, "variant": "reference" if args.reference else "ours",
        "compile": "none" if args.reference else args.compile, "step": timed, "busy_seconds": busy, "idle": idle,
        "by_kind": by_kind, "kernels": rows[:KEPT], "kernels_in_all": len(rows),
    }  # fmt: skip


def profile_rows(result: dict) -> list[tuple[str, ...]]:
    """The table of bench/README.md: the kinds, then the ten dearest kernels."""
    busy = result["busy_seconds"]
    rows = [("kernel", "kind", "calls a step", "ms a step", "share")]
    for kind, seconds in result["by_kind"].items():
        rows.append(("all", kind, "-", f"{seconds * 1e3:,.2f}", f"{seconds / busy:.1%}"))
    for row in result["kernels"][:10]:
        name = row["name"] if len(row["name"]) <= 60 else f"{row['name'][:57]}..."
        times = (f"{row['calls']:,.0f}", f"{row['seconds'] * 1e3:,.2f}", f"{row['seconds'] / busy:.1%}")
        rows.append((f"`{name.replace('`', '')}`", row["kind"], *times))
    if result["idle"] is not None:
        rows.append(("no kernel", "idle", "-", f"{result['idle'] * result['step']['median'] * 1e3:,.2f}", "-"))
    return rows


def name_of(args: argparse.Namespace) -> str:
    return "profile_reference" if args.reference else "profile"


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", default="", help="as bench.train_step's")
    parser.add_argument(
        "--samples", type=Range(int), default=0, help="a step; 0: 256 on a GPU, 16 on a CPU, 32 of a data set"
    )
    parser.add_argument("--layers", type=Range(int), default=0, help="of each tower, at full width; 0: the preset's")
    parser.add_argument("--reference", action="store_true", help="the padded reference and not ours")
    parser.add_argument("--compile", default="auto", choices=("auto", "none", "default", "reduce-overhead"))
    parser.add_argument("--kernels", default="auto", help="as train.py's")
    parser.add_argument("--steps", type=Range(int, least=1), default=2, help="under the profiler")
    parser.add_argument("--repeats", type=Range(int, least=1), default=10, help="timed steps without it")
    parser.add_argument("--trace", action="store_true", help="keep the trace: logs/profile_trace.json.gz beside it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    if args.compile == "auto":  # `default` and not graphs: replayed kernels lose the names of who launched them
        args.compile = "default" if device.type == "cuda" else "none"
    result = measure(args, device)
    file = write(name_of(args), device, result, args.out)
    for row in profile_rows(result):
        print(f"{row[0][:62]:62} {row[1]:10} {row[2]:>12} {row[3]:>10} {row[4]:>7}")
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
