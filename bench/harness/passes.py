"""Forward and backward passes of one operation: checked against its reference, then timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from bench.harness.timing import interleave, noise_of, random_bytes, summary
from bench.subjects.operators import Kernel
from nanovlm_fast.command import ran_out_of_memory

torch._functorch.config.donated_buffer = (
    False  # a compiled backward runs again and again on one forward
)
L2_BYTES = 64 * 2**20  # more than an H100's 50 MB
# Bytes that one timed replay moves: about 2 ms, beside which the launch of the graph is negligible.
LONG_ENOUGH = 6 * 10**9
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
    reference = kernel.reference
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
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise

        # The call synchronises with the device somewhere.
        def loop() -> None:
            for _ in range(rounds):
                call()

        return loop, False

    # A replay reads the inputs where they were, and only `call` holds them: freed, their memory may
    # no longer be mapped.
    def replay(_kept: Callable[[], None] = call) -> None:
        graph.replay()

    return replay, True


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying 1 GiB on the device.

    This is the roof of an operation that only moves memory.
    """
    size = 2**30 if device.type == "cuda" else 2**26
    source = random_bytes(size, device)
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
