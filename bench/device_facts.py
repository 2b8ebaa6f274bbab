"""What the device can do, before anything is measured on it: rates, clocks and power, versions.

    python -m bench.device_facts

`bench.roofline` divides by the bandwidth of a copy and the rate of a large product. The products of
nanoVLM's step show how much of that rate their shapes allow. Clocks, power and temperature are only
read, never set: once at rest, and once in the middle of a queue of products that keeps the device
busy.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.harness.machine import cpu_mhz, gpu_reading
from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.harness.timing import interleave, summary
from bench.roofline import measured_rates
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import make_current, pick_device

PACKAGES = (
    "triton",
    "numpy",
    "transformers",
    "flash-attn",
    "liger-kernel",
    "datasets",
    "wandb",
    "easy-vqa",
)
PRODUCTS = {  # rows, inner, columns in nanoVLM's step with 256 samples
    "vision fc1": (50176, 768, 3072),
    "vision qkv": (50176, 768, 2304),
    "language gate_up": (20736, 576, 3072),
    "language down": (20736, 1536, 576),
    "projector": (12544, 3072, 576),
}
# Products of 8192 x 8192 queued while the clocks are read: over a second of work on today's GPUs.
LOAD = 1000


def product_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of the step's products; a CPU computes a hundredth of the rows."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    divisor = 1 if on_gpu else 100
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    flops = {}
    for name, (rows, inner, columns) in PRODUCTS.items():
        a = torch.randn(rows // divisor, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        calls[name] = functools.partial(torch.matmul, a, b)
        flops[name] = 2 * len(a) * inner * columns
    times = interleave(calls, repeats=10, warmup=2)
    return {name: flops[name] / summary(seconds)["median"] for name, seconds in times.items()}


def under_load(device: torch.device) -> dict:
    """Clocks and power while the device multiplies; on a CPU only its clock."""
    if device.type != "cuda":
        return {"cpu_mhz": cpu_mhz()}
    a, b = (torch.randn(8192, 8192, device=device).to(torch.bfloat16) for _ in range(2))
    for _ in range(LOAD):
        a @ b
    reading = gpu_reading()  # launches are asynchronous: the queue is still being processed
    torch.cuda.synchronize()
    return reading


def properties(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),  # not in every version of torch
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def versions() -> dict[str, str | None]:
    """Installed versions; None for a package that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def measure(device: torch.device) -> dict:
    on_gpu = device.type == "cuda"
    # First, because it initialises the device: before that, nvidia-smi cannot be asked about it.
    rates = measured_rates(device, repeats=10 if on_gpu else 3)
    at_rest = gpu_reading() if on_gpu else {"cpu_mhz": cpu_mhz()}
    return {
        "copy_bytes_per_s": rates.bandwidth,
        "product_flops_per_s": rates.flops,
        "dtype": "bfloat16" if on_gpu else "float32",
        "products": product_rates(device),
        "at_rest": at_rest,
        "under_load": under_load(device),
        "properties": properties(device),
        "packages": versions(),
    }


def facts_rows(result: dict) -> Rows:
    """The table of bench/README.md."""
    dtype = result["dtype"]
    rows: Rows = [
        ("what", "measured"),
        ("copy", f"{result['copy_bytes_per_s'] / 1e9:,.0f} GB/s, read and written"),
        (f"{dtype} product", f"{result['product_flops_per_s'] / 1e12:.3g} TFLOP/s"),
    ]
    for name, rate in result["products"].items():
        rows.append((f"{name}, {dtype}", f"{rate / 1e12:.3g} TFLOP/s"))
    for when in ("at_rest", "under_load"):
        numbers = {n: v for n, v in result[when].items() if isinstance(v, (int, float))}
        read = ", ".join(f"{name} {value}" for name, value in numbers.items())
        rows.append((when.replace("_", " "), read or "-"))
    return rows


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.device_facts", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = make_current(pick_device(args.device))
    result = measure(device)
    file = write("facts", device, result, args.out)
    print(lined_up(facts_rows(result), left=(0, 1)))
    missing = [name for name, version in result["packages"].items() if version is None]
    print("not installed:", ", ".join(missing) or "-")
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
