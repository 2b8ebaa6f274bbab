"""Threads on a CPU that other processes use too: how they wait, and how many there should be.

PyTorch's threads meet at the end of every operator. One that arrives early spins for a while before
it sleeps. Beside a busy process, that spinning takes the time that the late thread needs, and
training all but stops. Two measures, both measured by `python -m bench.cpu_threads`:

- The spinning is bounded (`OPENMP`): it costs little where the cores are idle, and keeps a run
  going when another process starts beside it.
- A core that other processes keep busy while a command starts is left to them: one thread without
  waiting is faster there than two with it.

Both leave alone what the user has set (OMP_NUM_THREADS, OMP_WAIT_POLICY, GOMP_SPINCOUNT).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

# How often a thread of GNU OpenMP looks for the others before it sleeps: about 0.1 ms. By itself it
# does so for 3 ms.
OPENMP = {"GOMP_SPINCOUNT": "10000"}
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # the variables that decide this


@dataclass(frozen=True)
class Load:
    """A moment: its time, and the CPU seconds used so far by the machine and by this process."""

    at: float
    machine: float
    own: float


_start: Load | None = None  # when the command began


def machine_seconds() -> float | None:
    """CPU seconds that the whole machine has used; None where nobody tells (only Linux does)."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [int(value) for value in first.split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # without idle and waiting for disks
    return busy / os.sysconf("SC_CLK_TCK")


def read_load() -> Load | None:
    """The load by now; None where the system does not tell."""
    machine = machine_seconds()
    if machine is None:
        return None
    own = sum(os.times()[:4])  # this process and the children that it has waited for
    return Load(time.perf_counter(), machine, own)


def cores_of(process: int = 0) -> int:
    """Cores that a process (0: this one) may run on; all where nobody can say."""
    try:
        return len(os.sched_getaffinity(process))
    except (AttributeError, OSError):  # macOS has none; a parent may be gone
        return os.cpu_count() or 1


def begin() -> None:
    """At the start of a command, before torch is loaded: OpenMP reads its environment only then."""
    global _start
    _start = read_load()
    if not any(name in os.environ for name in WAITING):
        os.environ.update(OPENMP)


def busy_elsewhere(before: Load, now: Load) -> float:
    """Cores that other processes kept busy between two moments, on average."""
    others = (now.machine - before.machine) - (now.own - before.own)
    return max(0.0, others / max(now.at - before.at, 1e-9))


def others_since_begin() -> float | None:
    """`busy_elsewhere` since the command began.

    None where that is unknown, where less than half a second has passed, and where the user has set
    the number of threads.
    """
    now = read_load()
    if _start is None or now is None or now.at - _start.at < 0.5:
        return None
    return None if "OMP_NUM_THREADS" in os.environ else busy_elsewhere(_start, now)


def threads_beside(others: float, threads: int, cores: int) -> int:
    """How many of `threads` to keep where others keep that many of `cores` busy."""
    return max(1, min(threads, round(cores - others)))
