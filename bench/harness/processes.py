"""Work measured in a process of its own, and its peak memory."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.subjects.variants import Step
from nanovlm_fast.command import keeping_interrupts, ran_out_of_memory

NO_ROOM = "out of memory"


def peak_of_process(make: Callable[..., Step], *args: object) -> float | None:
    """MiB that two steps of `make(*args)` take in their own process; `make` must pickle.

    None where the system does not report it (not Linux). Raises RuntimeError if the process fails.
    """
    if not Path("/proc/self/status").exists():
        return None
    return in_a_process(_peak_of_made, make, *args)


def in_a_process(call: Callable, *args: object) -> Any:
    """Return `call(*args)` of a fresh process; raise RuntimeError, in one line, if it fails."""
    (result,) = from_a_process(_once, call, *args)
    return result


def from_a_process(generator: Callable[..., Iterator], *args: object) -> Iterator[Any]:
    """Yield what `generator(*args)` yields in a fresh process, as it arrives.

    Raises RuntimeError, in one line, if it fails.
    """
    # spawn, not fork: a forked child would inherit the parent's memory, and cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, generator, *args), daemon=True)
    with keeping_interrupts():
        process.start()
    sender.close()  # the child holds the only writing end, so its death ends the stream
    try:
        while True:
            value, error, more = receiver.recv()
            if error:
                raise RuntimeError(error)
            if not more:
                return
            yield value
    except KeyboardInterrupt:
        process.kill()
        raise
    except EOFError:  # the system kills a process when no memory is left
        raise RuntimeError(f"{NO_ROOM}, or else killed") from None
    finally:
        receiver.close()
        process.join()


def _send(sender: Any, generator: Callable[..., Iterator], *args: object) -> None:
    try:
        for value in generator(*args):
            sender.send((value, None, True))
        sender.send((None, None, False))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {lines[0] if lines else ''}"
        sender.send((None, NO_ROOM if ran_out_of_memory(error) else why, False))


def _once(call: Callable, *args: object) -> Iterator[Any]:
    yield call(*args)


def _peak_of_made(make: Callable[..., Step], *args: object) -> float:
    # A function of its own, because a lambda cannot be sent to the process.
    return peak_of(make(*args))


def in_use(device: torch.device) -> int:
    """Bytes in use: by tensors on a GPU, by the whole process on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident("VmRSS")


def peak_of(step: Any, before: int | None = None) -> float:
    """MiB of the step's weights and of everything else that two steps take.

    `before` is what was `in_use` with the weights alone (default: what is in use now). Two steps,
    because the optimizer allocates its state in the first one.
    """
    device = next(step.model.parameters()).device
    weights = sum(p.numel() * p.element_size() for p in step.model.parameters())
    before = in_use(device) if before is None else before
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory that earlier steps left cached is not this step's
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Restart the high-water mark of the process, where the kernel permits it.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return (most - before + weights) / 2**20


def _resident(field: str) -> int:
    """Bytes, from the status of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 2**10
