"""Peak memory of a training step by samples per step: the reference, and ours per recompute policy.

    python -m bench.memory                       nanoVLM's model; on a CPU two layers of each tower
    python -m bench.memory --samples 1,256
    python -m bench.memory --lora-rank 16        and with adapters on a frozen language model

A peak is all the memory of a process that does nothing but train: weights, gradients, optimizer
state, activations and the batch; on a CPU without the interpreter itself. Each variant runs in a
fresh process, two steps at each number of samples, fewest first. What does not fit is a row that
says so. A variant is measured only if its loss and gradients agreed with the reference's in the
same run. Without torch.compile ours takes the most; `--compile default` is what the preset trains
with, and costs a minute of compilation per peak. The table adds what nanoVLM published for an H100.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.harness.processes import (
    NO_ROOM,
    from_a_process,
    in_a_process,
    in_use,
    peak_of,
)
from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.subjects.variants import Adapted, Judge, Packed, Padded, Recipe, Step, Workbench
from bench.subjects.workload import load_work
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import make_current, pick_device, pick_dtype
from nanovlm_fast.model.recompute import POLICIES
from nanovlm_fast.ranges import Range

# huggingface/nanoVLM's numbers for rows of 128 positions, in units of 2^20 bytes (its script calls
# them MB); None: out of memory.
PUBLISHED_MIB = {1: 4400, 64: 18600, 128: 34000, 256: 64900, 512: None}
VARIANTS = ("reference", *POLICIES)
LORA = "LoRA, rank "


def variants_of(args: argparse.Namespace) -> tuple[str, ...]:
    """What is measured. The adapters come last: the check adds them to the model of the others."""
    return (*VARIANTS, f"{LORA}{args.lora_rank}") if args.lora_rank else VARIANTS


def label_of(variant: str) -> str:
    if variant == "reference":
        return variant
    return f"ours, {variant}" if variant.startswith(LORA) else f"ours, recompute {variant}"


# ---- the suite
def make_bench(args: argparse.Namespace, samples: int) -> Workbench:
    torch.set_num_threads(args.threads)
    device = make_current(torch.device(args.device))
    work = load_work(args.preset, args.data, samples, args.layers)
    return Workbench(work, device, pick_dtype(args.dtype, device))


def make_step(bench: Workbench, variant: str, compile: str) -> Step:
    if variant == "reference":
        return Padded(bench)
    if variant.startswith(LORA):
        return Adapted(bench, Recipe(compile=compile), int(variant.removeprefix(LORA)))
    return Packed(bench, Recipe(recompute=variant, compile=compile))


def check(args: argparse.Namespace) -> dict[str, dict]:
    """Whether each variant makes the same step as the reference, on two samples."""
    bench = make_bench(args, 2)
    judge = Judge(Padded(bench), bench.dtype, args.tolerance)
    found = {}
    for variant in variants_of(args):
        judged_by = judge.without("decoder") if variant.startswith(LORA) else judge
        found[variant] = judged_by(make_step(bench, variant, args.compile))
    return found


def measured_peaks(args: argparse.Namespace, variant: str) -> Iterator[float]:
    """MiB of one variant at each number of samples, fewest first.

    It has the process and the device to itself. Fewest first, because a high-water mark only rises.
    """
    bench = make_bench(args, args.samples[0])
    # Drop the model that this variant does not use, so that it is not part of the peak.
    if variant == "reference":
        bench.packed, bench.optimizers = None, []
    else:
        bench.padded = None
    # Adapters now, and not at the first step: their library is no part of the peak.
    if variant.startswith(LORA):
        make_step(bench, variant, args.compile)
    before = in_use(bench.device)
    for samples in args.samples:
        bench.work = load_work(args.preset, args.data, samples, args.layers)
        yield peak_of(make_step(bench, variant, args.compile), before)


def compare(args: argparse.Namespace, device: torch.device) -> tuple[dict, Path]:
    """Measure all peaks; write the file after each, so that a killed run keeps what it has."""
    found: dict[str, dict[str, dict]] = {variant: {} for variant in variants_of(args)}
    result: dict[str, Any] = {
        "preset": args.preset,
        "layers": args.layers,
        "data": args.data,
        "compile": args.compile,
        "dtype": str(pick_dtype(args.dtype, device)).removeprefix("torch."),
        "published_mib": PUBLISHED_MIB,
    }
    with tqdm(total=1 + len(args.samples) * len(found), desc="peaks", leave=False) as bar:
        result |= {"parity": in_a_process(check, args), "peaks": found}
        bar.update()
        for variant, rows in found.items():
            for samples, row in rows_of(args, variant, result["parity"][variant]):
                rows[str(samples)] = row
                file = write("memory", device, result, args.out)
                bar.update()
    return result, file


def rows_of(args: argparse.Namespace, variant: str, parity: dict) -> Iterator[tuple[int, dict]]:
    """(samples, row) with a peak, or the error; what did not fit is not tried with more samples."""
    left = list(args.samples)
    try:
        if not parity["passed"]:
            raise RuntimeError(f"not the reference's step: {parity['gradient']:.1e} in a gradient")
        for mib in from_a_process(measured_peaks, args, variant):
            yield left.pop(0), {"peak_mib": mib}
    except RuntimeError as error:
        for i, samples in enumerate(left):
            fewer = i and str(error).startswith(NO_ROOM)
            yield samples, {"error": f"{error} with fewer" if fewer else str(error)}


def table(result: dict) -> str:
    """MiB: one row per variant, one column per number of samples; errors are listed below."""
    columns = list(next(iter(result["peaks"].values())))
    rows: Rows = [("peak MiB, samples per step", *columns)]
    errors = []
    for variant, found in result["peaks"].items():
        cells = (f"{row['peak_mib']:,.0f}" if "peak_mib" in row else "-" for row in found.values())
        rows.append((label_of(variant), *cells))
        for samples, row in found.items():
            if "error" in row:
                errors.append(f"{label_of(variant)} at {samples}: {row['error']}")
    if result["preset"] == "nanovlm-222m" and not result["layers"]:
        known = [PUBLISHED_MIB.get(int(samples), 0) for samples in columns]
        cells = (NO_ROOM if mib is None else f"{mib:,}" if mib else "-" for mib in known)
        rows.append(("nanoVLM, published, on an H100", *cells))
    return "\n".join([lined_up(rows), *errors])


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two numbers of samples; on a CPU preset tiny"
    )
    parser.add_argument("--preset", default="", help="default: nanovlm-222m")
    parser.add_argument(
        "--layers",
        type=Range(int, least=-1),
        default=-1,
        help="of each tower; 0: the preset's, as on a GPU; CPU: 2",
    )
    parser.add_argument("--data", default="cauldron_like", help="as bench.train_step's")
    parser.add_argument(
        "--samples",
        type=Range(int, least=1).several,
        help="per step, comma-separated; default: 1,64,128,256,512; on a CPU 1,4,16",
    )
    parser.add_argument("--compile", default="none", choices=("none", "default"), help="of ours")
    parser.add_argument(
        "--lora-rank",
        type=Range(int, most=65536),
        default=0,
        help="also adapters of this rank, without recomputation; 0: not",
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--tolerance", type=Range(float), default=1e-4, help="relative, in float32")
    parser.add_argument(
        "--threads", type=Range(int), default=0, help="CPU threads; 0: PyTorch's choice"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    args.device = str(pick_device(args.device))
    on_gpu = args.device.startswith("cuda")
    few, many = ([1, 256], [1, 64, 128, 256, 512]) if on_gpu else ([1, 8], [1, 4, 16])
    args.samples = args.samples or (few if args.quick else many)
    args.preset = args.preset or ("tiny" if args.quick and not on_gpu else "nanovlm-222m")
    args.layers = args.layers if args.layers >= 0 else 0 if on_gpu else 2
    args.threads = args.threads or torch.get_num_threads()
    load_work(args.preset, args.data, 1, args.layers)
    return args


@reports_errors(RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not args.device.startswith("cuda") and not Path("/proc/self/status").exists():
        raise ValueError("on a CPU this needs Linux, which reports the memory of a process")
    result, file = compare(args, torch.device(args.device))
    print(table(result))
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
