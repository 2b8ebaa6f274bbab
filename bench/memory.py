"""Peak memory of a variant: all that a process which trains with nothing else would hold.

Weights, gradients, optimizer state, activations and the batch; on a CPU of a fresh process, without its interpreter.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path

from bench.variants import Step


def peak_of_process(make: Callable[..., Step], *args: object) -> float | None:
    """MiB that two steps of `make(*args)`, a function that pickles, take in a process of their own.

    None where the system does not tell (not Linux). Raises RuntimeError if the process fails.
    """
    if not Path("/proc/self/status").exists():
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_two_steps, args=(queue, make, *args))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring memory failed with exit code {process.exitcode}")
    return queue.get()


def _two_steps(queue, make: Callable[..., Step], *args: object) -> None:
    step = make(*args)
    before = _resident("VmRSS")
    with contextlib.suppress(OSError):  # start the high-water mark anew, where the kernel lets us
        Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    weights = sum(p.numel() * p.element_size() for p in step.model.parameters())
    queue.put((_resident("VmHWM") - before) / 2**10 + weights / 2**20)


def _resident(field: str) -> int:
    """KiB, from this process's status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])
