"""Every kernel beside its rivals: forward, backward and both, at nanoVLM's sizes.

    python -m bench.kernels                         on a GPU
    python -m bench.kernels --small --device cpu    a rehearsal at toy sizes; the kernels run as
                                                    their references

bench/subjects/rivals.py lists the rivals. The result is bench/results/<gpu>/kernels.json. A
provider is timed only if its outputs and gradients pass the tolerance rule in the same process, and
our kernel only if none of its tests failed in `bench.checks` on this device and commit. On a GPU
the times come from replaying CUDA graphs that run over several copies of the inputs, so that no
call finds its inputs in L2; the providers take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

from bench.checks import red_kernels
from bench.harness.passes import (
    PASSES,
    Timer,
    agrees,
    copy_bandwidth,
    in_a_line,
    on_stream,
    peak_memory,
)
from bench.harness.results import write
from bench.harness.tables import Rows, lined_up
from bench.harness.timing import difference, interleave, summary
from bench.subjects.operators import NOTHING, Kernel, call_of, named
from bench.subjects.rivals import PROVIDERS, as_timed
from nanovlm_fast.command import Parser, ran_out_of_memory, reports_errors
from nanovlm_fast.device import make_current, pick_device
from nanovlm_fast.ranges import Range

# A compiled backward runs many times on one forward here, so it must not reuse its buffers.

RED = "its tests failed on this device: see tests.json"


def plain_product(inputs: dict) -> Callable[[], Tensor]:
    """cuBLAS' product at the sizes of a projection, on an input that needs no shuffle.

    It is what the gathering kernel has to come close to.
    """
    x = inputs["x"]
    weight = inputs["weight"]
    rows = x.reshape(-1, weight.shape[1])
    return lambda: torch.nn.functional.linear(rows, weight)


def measure(kernel: Kernel, sizes: dict, args: argparse.Namespace, device: torch.device) -> dict:
    """{provider: {'error': why} or {pass: {median, quartiles, ...}}}, in seconds per call."""
    return on_stream(lambda stream: measure_here(kernel, sizes, args, device, stream), device)


def timed_row(timer: Timer, provider: str, call: Callable, inputs: dict) -> dict:
    """Add a provider to the timer; its row says whether it is a graph, or that memory ran out."""
    try:
        return {"graph": timer.add(provider, call, inputs)}
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        timer.drop(provider)  # some of its passes may already be in
        return {"error": in_a_line(error)}


def measure_here(
    kernel: Kernel,
    sizes: dict,
    args: argparse.Namespace,
    device: torch.device,
    stream: torch.cuda.Stream | None,
) -> dict:
    """`measure` on the current stream, which is `stream` on a GPU."""
    dtype = torch.float32 if args.small else torch.bfloat16
    inputs = kernel.module.make_inputs(**sizes, dtype=dtype, device=device.type)
    cost = kernel.module.cost(**sizes, dtype=dtype)
    timer = Timer(cost["forward"][0], stream)
    rows: dict[str, dict] = {}
    for provider, make in PROVIDERS.items():
        call = call_of(make, kernel)
        if isinstance(call, str):
            rows[provider] = {"error": call}
        elif provider in ("ours", "in place") and kernel.name in args.red:
            # Not even launched: an illegal access would end the CUDA context of all other rows.
            rows[provider] = {"error": RED}
        elif wrong := agrees(call, kernel, inputs):
            rows[provider] = {"error": wrong}
        else:
            rows[provider] = timed_row(timer, provider, as_timed(provider, kernel, call), inputs)
    for provider, times in timer.times(args.repeats).items():
        rows[provider] |= times
        if stream:
            call = call_of(PROVIDERS[provider], kernel)
            assert not isinstance(call, str)  # a provider without a callable has no times
            rows[provider]["peak_bytes"] = peak_memory(as_timed(provider, kernel, call), inputs)
    result: dict = {
        "sizes": {k: str(v) for k, v in sizes.items()},
        "dtype": str(dtype),
        "cost": cost,
        "providers": rows,
    }
    if kernel.matrix and "weight" in inputs:  # attention is no projection
        product = {"product": plain_product(inputs)}
        result["plain_product"] = summary(interleave(product, args.repeats, warmup=3)["product"])
    return result


def table(results: dict, bandwidth: float) -> str:
    """The results as text.

    `of copy` compares the rate at which the forward moves its fewest bytes with that of a plain
    copy. The last column is for forward and backward together.
    """
    times = (f"{part} us" for part in PASSES)
    head = ("kernel", "provider", *times, "of copy, fwd", "peak MB")
    rows: Rows = [(*head, "speed against torch.compile")]
    for name, result in results.items():
        for provider, row in result["providers"].items():
            if "error" in row:
                if row["error"] != NOTHING:
                    rows.append((name, provider, row["error"]))
                continue
            times = (f"{row[part]['median'] * 1e6:.1f}" for part in PASSES)
            share = result["cost"]["forward"][0] / row["forward"]["median"] / bandwidth
            memory = f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else "-"
            against = against_compile(result["providers"], provider)
            rows.append((name, provider, *times, f"{share:.0%}", memory, against))
        if "plain_product" in result:
            time = f"{result['plain_product']['median'] * 1e6:.1f} us forward"
            rows.append((name, "library", f"{time} (the product alone, on shuffled input)"))
    return lined_up(rows, left=(0, 1))


def against_compile(providers: dict, provider: str) -> str:
    """How many times as fast as torch.compile, forward and backward together; "" if unknown."""
    rival = providers.get("compile", {}).get("both")
    if provider == "compile" or rival is None:
        return ""
    both = providers[provider]["both"]
    return str(difference(both["seconds"], rival["seconds"], both["noise"]))


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels, separated by commas")
    parser.add_argument("--small", action="store_true", help="toy sizes in float32: a rehearsal")
    parser.add_argument("--repeats", type=Range(int, least=1), default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="folder of results (default: bench/results)")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    device = make_current(pick_device(args.device))
    chosen = named(args.only)
    if device.type != "cuda" and not args.small:
        raise ValueError(
            "the kernels are measured on a GPU, and there is none; "
            "--small --device cpu runs a rehearsal"
        )
    args.red = red_kernels(device, args.out)
    bandwidth = copy_bandwidth(device)
    results: dict[str, dict] = {}
    for kernel in chosen:
        all_sizes = {kernel.name: kernel.small}
        if not args.small:
            all_sizes = {kernel.name: kernel.sizes}
            all_sizes |= {f"{kernel.name}, {label}": sizes for label, sizes in kernel.also.items()}
        for label, sizes in all_sizes.items():
            results[label] = measure(kernel, sizes, args, device)
            record = {"copy_bytes_per_s": bandwidth, "small": args.small, "kernels": results}
            # After every kernel: a later one may take the device, and this process, with it.
            file = write("kernels", device, record, args.out)
    if args.small:
        print("a rehearsal at toy sizes: everything runs and agrees; the times mean nothing")
    print(table(results, bandwidth))
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
