"""What the device can do, before anything is measured on it: rates, clocks and power under load, what is installed.

    python -m bench.device_facts

The copy's bandwidth and the rate of a large product are what `bench.roofline` divides by. The products of the seed's
step say how much of that rate their shapes allow. Clocks, power and temperature are read twice, never set: at rest, and
in the middle of a queue of products that keeps the device busy.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

from bench.machine import cpu_mhz, gpu_reading
from bench.results import write
from bench.roofline import measured_rates
from bench.timing import interleave, summary
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device

PACKAGES = ("triton", "numpy", "transformers", "flash-attn", "liger-kernel", "datasets", "wandb", "easy-vqa")
PRODUCTS = {  # rows, inner, columns: of the seed's step at 256 samples
    "vision fc1": (50176, 768, 3072),
    "vision qkv": (50176, 768, 2304),
    "language gate_up": (20736, 576, 3072),
    "language down": (20736, 1536, 576),
    "projector": (12544, 3072, 576),
}
LOAD = 1000  # products of 8192 that the clocks are read under: over a second on any GPU of today


def product_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of the step's products; a CPU gets a hundredth of the rows."""
    on_gpu = device.type == "cuda"
    dtype, share, calls, flops = (torch.bfloat16 if on_gpu else torch.float32), (1 if on_gpu else 100), {}, {}
    for name, (rows, inner, columns) in PRODUCTS.items():
        a = torch.randn(rows // share, inner, device=device).to(dtype)
        b = torch.randn(inner, columns, device=device).to(dtype)
        calls[name], flops[name] = (lambda a=a, b=b: a @ b), 2 * len(a) * inner * columns
    times = interleave(calls, repeats=10, warmup=2)
    return {name: flops[name] / summary(seconds)["median"] for name, seconds in times.items()}


def under_load(device: torch.device) -> dict:
    """Clocks and power while the device multiplies; of a CPU its clock now."""
    if device.type != "cuda":
        return {"cpu_mhz": cpu_mhz()}
    a, b = (torch.randn(8192, 8192, device=device).to(torch.bfloat16) for _ in range(2))
    for _ in range(LOAD):
        a @ b
    reading = gpu_reading()  # the queue is still being worked on
    torch.cuda.synchronize()
    return reading


def properties(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    values = {"compute_capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count}
    values |= {"memory_bytes": found.total_memory, "l2_bytes": getattr(found, "L2_cache_size", None)}
    return values | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def versions() -> dict[str, str | None]:
    """None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def measure(device: torch.device) -> dict:
    rates = measured_rates(
        device, repeats=10 if device.type == "cuda" else 3
    )  # the first use of the device: from here on there is a reading
    at_rest = gpu_reading() if device.type == "cuda" else {"cpu_mhz": cpu_mhz()}
    result = {"copy_bytes_per_s": rates.bandwidth, "product_flops_per_s": rates.flops}
    result |= {"dtype": "bfloat16" if device.type == "cuda" else "float32", "products": product_rates(device)}
    result |= {"at_rest": at_rest, "under_load": under_load(device)}
    return result | {"properties": properties(device), "packages": versions()}


def facts_rows(result: dict) -> list[tuple[str, ...]]:
    """The table of bench/README.md."""
    rows = [("what", "measured"), ("copy", f"{result['copy_bytes_per_s'] / 1e9:,.0f} GB/s, read and written")]
    rows.append((f"{result['dtype']} product", f"{result['product_flops_per_s'] / 1e12:.3g} TFLOP/s"))
    rows += [(f"{name}, {result['dtype']}", f"{rate / 1e12:.3g} TFLOP/s") for name, rate in result["products"].items()]
    for when in ("at_rest", "under_load"):
        read = ", ".join(f"{name} {value}" for name, value in result[when].items() if isinstance(value, (int, float)))
        rows.append((when.replace("_", " "), read or "-"))
    return rows


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.device_facts", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    result = measure(device)
    file = write("facts", device, result, args.out)
    for what, measured in facts_rows(result)[1:]:
        print(f"{what:28} {measured}")
    print("not installed:", ", ".join(name for name, version in result["packages"].items() if version is None) or "-")
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
