"""Every kernel beside its rivals: forward, backward and both, at nanoVLM's sizes.

    python -m bench.kernels                         on a GPU
    python -m bench.kernels --small --device cpu    a rehearsal at toy sizes; the kernels run as
                                                    their references

bench/registry.py lists the rivals. The result is bench/results/<gpu>/kernels.json. A provider
is timed only if its outputs and gradients pass the tolerance rule in the same process, and our
kernel only if none of its tests failed in `bench.checks` on this device and commit. On a GPU the
times come from replaying CUDA graphs that run over several copies of the inputs, so that no call
finds its inputs in L2; the providers take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from bench.checks import red_kernels
from bench.registry import NOTHING, PROVIDERS, Kernel, call_of, named
from bench.results import write
from bench.timing import difference, interleave, noise_of, summary
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.device import pick_device
from nanovlm_fast.ranges import Range

# A compiled backward runs many times on one forward here, so it must not reuse its buffers.
torch._functorch.config.donated_buffer = False
L2_BYTES = 64 * 2**20  # more than an H100's 50 MB
# Bytes that one timed replay moves: about 2 ms, beside which the launch of the graph is negligible.
LONG_ENOUGH = 6 * 10**9
RED = "its tests failed on this device: see tests.json"
PASSES = ("forward", "backward", "both")


def leaves_of(inputs: dict) -> dict:
    """Floating-point tensors of the inputs as leaves that require gradients; the rest unchanged."""
    return {
        name: value.detach().clone().requires_grad_() if is_float(name, value) else value
        for name, value in inputs.items()
    }


def is_float(name: str, value: object) -> bool:
    """Whether the input has a gradient; the rotary tables `cos` and `sin` have none."""
    if name in ("cos", "sin"):
        return False
    return isinstance(value, Tensor) and value.is_floating_point()


def wanted_of(leaves: dict) -> list[Tensor]:
    """The leaves whose gradients are computed."""
    return [value for name, value in leaves.items() if is_float(name, value)]


def results_of(call: Callable, inputs: dict) -> list[Tensor]:
    """Differentiable outputs, and every gradient under fixed random upstream gradients."""
    leaves = leaves_of(inputs)
    outputs = [o for o in as_tuple(call(**leaves)) if o.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted_of(leaves), upstream(outputs))
    return [*(o.detach() for o in outputs), *gradients]


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def upstream(outputs: list[Tensor]) -> list[Tensor]:
    """Random gradients of the outputs; one seed, so that every provider gets the same."""
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    return [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]


def agrees(call: Callable, kernel: Kernel, inputs: dict) -> str | None:
    """None if the provider passes the tolerance rule against the reference, else what is wrong."""
    reference = getattr(kernel.module, f"{kernel.name}_reference")
    wide = {
        n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in inputs.items()
    }
    try:
        truth = results_of(reference, wide)
        return within_rule(truth, results_of(reference, inputs), results_of(call, inputs))
    except Exception as error:  # a provider that cannot run is a row of the table, not its end
        return in_a_line(error)


def in_a_line(error: Exception) -> str:
    """The type and the first line of an error, as a row of a table shows it."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def within_rule(truth: list[Tensor], plain: list[Tensor], ours: list[Tensor]) -> str | None:
    """Apply the tolerance rule: None if `ours` passes, else the error and what is allowed.

    `truth` is computed in float32, `plain` by PyTorch in the dtype of `ours`. The error may be at
    most twice that of `plain`, so no tolerance is set by hand.
    """
    for gt, ref, out in zip(truth, plain, ours, strict=True):
        error = (out - gt).abs().max()
        # The second term allows for rounding in float32, where `plain` may happen to be exact.
        allowed = 2 * (ref - gt).abs().max() + 1e-5 * gt.abs().max()
        if not error <= allowed:  # not `error > allowed`, which is False for NaN
            return f"error {error:.1e}, allowed {allowed:.1e}"
    return None


def passes_of(call: Callable, copies: list[dict]) -> dict[str, Callable[[], None]]:
    """One callable per pass; each call goes over all copies of the inputs once."""
    leaves = [leaves_of(inputs) for inputs in copies]

    def outputs_of(one: dict) -> list[Tensor]:
        return [o for o in as_tuple(call(**one)) if o.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            for one in leaves:
                call(**one)

    def both() -> None:
        for one, given in zip(leaves, gradients, strict=True):
            torch.autograd.grad(outputs_of(one), wanted_of(one), given)

    # Graphs of autograd that the backward pass runs again and again, made once.
    kept = [(outputs_of(one), wanted_of(one)) for one in leaves]
    gradients = [upstream(outputs) for outputs, _ in kept]

    def backward() -> None:
        for (outputs, wanted), given in zip(kept, gradients, strict=True):
            torch.autograd.grad(outputs, wanted, given, retain_graph=True)

    return {"forward": forward, "backward": backward, "both": both}


def as_graph(
    call: Callable[[], None],
    rounds: int,
    stream: torch.cuda.Stream,
    pool: Any = None,
) -> tuple[Callable[[], None], bool]:
    """Record `rounds` calls as a CUDA graph; return a function that replays it, and True.

    A graph leaves Python and the launches out of the time. A call that cannot be recorded is
    returned as a plain loop, with False. Everything must have run on `stream`, including the
    forwards that a backward goes back through. Graphs may share a memory `pool` if nobody reads
    their results.
    """
    for _ in range(3):  # compile, autotune and allocate before recording, which allows none of it
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, pool=pool):
            for _ in range(rounds):
                call()
        return graph.replay, True
    except torch.OutOfMemoryError:  # a RuntimeError too, but of another kind
        raise
    except RuntimeError:  # the call synchronises with the device somewhere

        def loop() -> None:
            for _ in range(rounds):
                call()

        return loop, False


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying 1 GiB on the device.

    This is the roof of an operation that only moves memory.
    """
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, repeats=20, warmup=3)["copy"]
    return 2 * source.numel() / summary(times)["median"]


def peak_memory(call: Callable, inputs: dict) -> int:
    """Peak bytes of a forward and backward on the device, beside their inputs and gradients."""
    leaves = leaves_of(inputs)
    wanted = wanted_of(leaves)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = [o for o in as_tuple(call(**leaves)) if o.requires_grad]
    torch.autograd.grad(outputs, wanted, upstream(outputs))
    torch.cuda.synchronize()
    gradients = sum(v.numel() * v.element_size() for v in wanted)
    return torch.cuda.max_memory_allocated() - before - gradients


def plain_product(inputs: dict) -> Callable[[], Tensor]:
    """cuBLAS' product at the sizes of a projection, on an input that needs no shuffle.

    It is what the gathering kernel has to come close to.
    """
    x = inputs["x"]
    weight = inputs["weight"]
    rows = x.reshape(-1, weight.shape[1])
    return lambda: torch.nn.functional.linear(rows, weight)


def on_stream(measure: Callable[[torch.cuda.Stream | None], dict], device: torch.device) -> dict:
    """Run `measure` on its own stream, which recording CUDA graphs requires; on a CPU with None."""
    if device.type != "cuda":
        return measure(None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = measure(stream)
    torch.cuda.synchronize()
    return result


class Timer:
    """Times of several callables on the same work, in turn: forward, backward and both.

    On a GPU a call is recorded as a CUDA graph over several copies of its inputs. `moved` is the
    fewest bytes that a forward moves; the number of copies and of rounds follows from it.
    """

    def __init__(self, moved: int, stream: torch.cuda.Stream | None):
        self.stream = stream
        # Enough copies that together they exceed L2 four times: each call then finds cold inputs.
        self.copies = 1 + max(2, min(8, 4 * L2_BYTES // moved)) if stream else 1
        self.rounds = max(1, min(200, LONG_ENOUGH // (moved * self.copies))) if stream else 1
        self.calls: dict[str, dict[str, Callable]] = {name: {} for name in PASSES}
        self.pool = torch.cuda.graph_pool_handle() if stream else None

    def add(self, name: str, call: Callable, inputs: dict) -> bool:
        """Add a callable; return whether all its passes were recorded as CUDA graphs."""
        copies = [inputs]
        for _ in range(self.copies - 1):
            copies.append({n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()})
        graphs = []
        for part, one in passes_of(call, copies).items():
            graph = False
            if self.stream:
                one, graph = as_graph(one, self.rounds, self.stream, self.pool)
            self.calls[part][name] = one
            graphs.append(graph)
        return all(graphs)

    def drop(self, name: str) -> None:
        for calls in self.calls.values():
            calls.pop(name, None)

    def times(self, repeats: int) -> dict[str, dict[str, dict]]:
        """{callable: {pass: {median, quartiles, seconds}}}, in seconds per call."""
        rows: dict[str, dict[str, dict]] = {}
        for part, calls in self.calls.items():
            if not calls:
                continue
            taken = interleave(calls, repeats, warmup=3, self_check=True)
            noise = noise_of(taken)  # also removes the self-check, which is no provider
            for name, times in taken.items():
                seconds = [t / (self.copies * self.rounds) for t in times]
                rows.setdefault(name, {})[part] = {**summary(seconds, noise), "seconds": seconds}
        return rows


def measure(kernel: Kernel, sizes: dict, args: argparse.Namespace, device: torch.device) -> dict:
    """{provider: {'error': why} or {pass: {median, quartiles, ...}}}, in seconds per call."""
    return on_stream(lambda stream: measure_here(kernel, sizes, args, device, stream), device)


def timed_row(timer: Timer, provider: str, call: Callable, inputs: dict) -> dict:
    """Add a provider to the timer; its row says whether it is a graph, or that memory ran out."""
    try:
        return {"graph": timer.add(provider, call, inputs)}
    except torch.OutOfMemoryError as error:
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
            rows[provider] = timed_row(timer, provider, call, inputs)
    for provider, times in timer.times(args.repeats).items():
        rows[provider] |= times
        if stream:
            call = call_of(PROVIDERS[provider], kernel)
            assert not isinstance(call, str)  # a provider without a callable has no times
            rows[provider]["peak_bytes"] = peak_memory(call, inputs)
    result: dict = {
        "sizes": {k: str(v) for k, v in sizes.items()},
        "dtype": str(dtype),
        "cost": cost,
        "providers": rows,
    }
    if kernel.matrix:
        product = {"product": plain_product(inputs)}
        result["plain_product"] = summary(interleave(product, args.repeats, warmup=3)["product"])
    return result


def table(results: dict, bandwidth: float) -> str:
    """The results as text.

    `of copy` compares the rate at which the forward moves its fewest bytes with that of a plain
    copy. The last column is for forward and backward together.
    """
    names = (*(f"{part} us" for part in PASSES), "of copy, fwd", "peak MB")
    names = (*names, "speed against torch.compile")
    lines = [f"{'kernel':32} {'provider':12} {' '.join(f'{name:>11}' for name in names)}"]
    for name, result in results.items():
        for provider, row in result["providers"].items():
            if "error" in row:
                if row["error"] != NOTHING:
                    lines.append(f"{name:32} {provider:12} {row['error']}")
                continue
            times = " ".join(f"{row[p]['median'] * 1e6:>11.1f}" for p in PASSES)
            share = result["cost"]["forward"][0] / row["forward"]["median"] / bandwidth
            memory = f"{row['peak_bytes'] / 1e6:>11,.0f}" if "peak_bytes" in row else f"{'':11}"
            against = against_compile(result["providers"], provider)
            lines.append(f"{name:32} {provider:12} {times} {share:>12.0%} {memory} {against:>27}")
        if "plain_product" in result:
            seconds = result["plain_product"]["median"]
            time = f"{seconds * 1e6:>11.1f} (the product alone, on shuffled input)"
            lines.append(f"{name:32} {'library':12} {time}")
    return "\n".join(lines)


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
    device = pick_device(args.device)
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
