"""The clocks: a call as one reading. On a GPU it is replayed as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nanovlm_fast.tune.measure import Read, Reading

WARM_UPS = 3  # calls before a capture: they compile, and allocate what stays
LEAST_SECONDS = 4e-3  # of one reading on a GPU, so that its events are exact enough
SPIN_CYCLES = 400_000  # 0.2 ms: how long the GPU's clock is looked at


def reader(call: Callable[[], object], device: torch.device, captured: bool = True) -> Read:
    """Compile and warm up a call; return what takes a reading of it.

    With `captured`, a GPU replays it as one CUDA graph, without the host's launches.
    """
    if device.type != "cuda":
        call()
        return lambda: by_the_hosts_clock(call)
    torch.cuda.synchronize(device)
    if captured:
        return by_the_devices_clock(capture(call, device))
    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize(device)
    return by_the_devices_clock(call)


def by_the_hosts_clock(call: Callable[[], object]) -> Reading:
    start = time.perf_counter()
    call()
    return Reading(time.perf_counter() - start)


def capture(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph, which overwrites its results at each replay."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # On a stream of its own, as a capture wants it: what is allocated here belongs to that stream.
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    # A replay reads the inputs where they were, and only `call` holds some of them: freed, their
    # memory would be another's, or no longer be mapped, which ends the use of the device.
    kept = call, results

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def by_the_devices_clock(call: Callable[[], object]) -> Read:
    """Readings of as many calls in a row as take `LEAST_SECONDS`, by CUDA events."""
    once = elapsed(call)
    repeats = max(1, round(LEAST_SECONDS / max(once, 1e-6)))

    def several() -> None:
        for _ in range(repeats):
            call()

    def read() -> Reading:
        seconds = elapsed(several) / repeats
        return Reading(seconds, clock())

    return read


def elapsed(call: Callable[[], object]) -> float:
    """Seconds between two events around a call."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock() -> float:
    """The clock of the multiprocessors now, in Hz: a kernel that counts cycles, by events.

    nvidia-smi would take longer than what is timed.
    """
    return SPIN_CYCLES / elapsed(lambda: torch.cuda._sleep(SPIN_CYCLES))
