"""State of the machine while times are taken: clocks, power, temperature, load of other processes.

Everything is read, nothing is set.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import torch

from nanovlm_fast.threads import machine_seconds

BUSY = 0.1  # share of the CPUs that other processes may use before a result carries a warning
GPU_FIELDS = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
# The same field under the names of newer and of older drivers.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# NVML's bits for why the clocks are below what was requested.
SLOWED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal",
    0x40: "thermal",
    0x80: "power brake",
}


class Watch:
    """A context around everything that is timed; `record` is what a result file keeps of it.

    It is entered once per measurement; the readings span the first entry to the last exit.
    """

    def __init__(self) -> None:
        self.before: dict | None = None
        self.after: dict = {}
        self.seconds = self.others = 0.0
        self.slowed: set[str] = set()

    def __enter__(self) -> Watch:
        if self.before is None:
            self.before = self.read()
        self.start = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        began, (busy, own) = self.start
        busy_now, own_now = cpu_seconds()
        self.seconds += time.perf_counter() - began
        self.others += max(0.0, busy_now - busy - (own_now - own))
        self.after = self.read()

    def read(self) -> dict:
        """Load average and MHz of the CPU; if this process uses a GPU, its nvidia-smi readings."""
        values: dict = {"load_average": os.getloadavg()[0], "cpu_mhz": cpu_mhz()}
        # Not `is_available`: reading must not create a CUDA context that a CPU run has no use for.
        if torch.cuda.is_initialized():
            values["gpu"] = gpu_reading()
            # Collected over all readings, because a slowdown may have ended at the last one.
            self.slowed |= set(values["gpu"].get("slowed", ()))
        return values

    def record(self) -> dict | None:
        """{before, after, seconds, others_cpus, warnings}; None if nothing was timed."""
        if self.before is None:
            return None
        cpus = os.cpu_count() or 1
        warnings = []
        # CPU time is counted in hundredths of a second: too coarse for less than half a second.
        others = self.others / self.seconds if self.seconds > 0.5 else 0.0
        if others > BUSY * cpus:
            warnings.append(f"other processes used {others:.1f} of the {cpus} CPUs meanwhile")
        if self.slowed:
            warnings.append(f"the GPU slowed down: {', '.join(sorted(self.slowed))}")
        times = {"seconds": self.seconds, "others_cpus": others, "warnings": warnings}
        return {"before": self.before, "after": self.after, **times}


# One for the process: `interleave` enters it, and the result file is written elsewhere.
WATCH = Watch()


def cpu_seconds() -> tuple[float, float]:
    """CPU time used by the whole machine, and by this process's group (with its workers).

    Only Linux counts both; elsewhere the result is zeros.
    """
    busy = machine_seconds()
    if busy is None:
        return 0.0, 0.0
    own = 0
    group = str(os.getpgrp())
    for place in os.scandir("/proc"):
        if place.name.isdigit():
            try:
                # Fields are counted after the name in parentheses, which may contain spaces.
                after_name = Path(place.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:  # the process has ended since the folder was listed
                continue
            if after_name[2] == group:
                # Its own user and system time, and that of children it has waited for.
                own += sum(map(int, after_name[11:15]))
    return busy, own / os.sysconf("SC_CLK_TCK")


def cpu_mhz() -> float | None:
    """Mean clock of the CPUs; None where Linux does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)
    return sum(map(float, found)) / len(found) if found else None


def gpu_reading() -> dict:
    """MHz, watts and degrees Celsius of this process's GPU.

    `slowed` lists why its clocks are held back at this moment.
    """
    # By uuid: CUDA_VISIBLE_DEVICES renumbers devices for torch but not for nvidia-smi.
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    for reasons in REASONS:
        text = query_gpu((*GPU_FIELDS, reasons), gpu)
        if text is None:
            continue
        *numbers, active = (part.strip() for part in text.split(","))
        pairs = zip(GPU_FIELDS, numbers, strict=True)
        values: dict = {name: number(value) for name, value in pairs}
        mask = int(active, 16) if active.startswith("0x") else 0
        return {**values, "slowed": sorted({why for bit, why in SLOWED.items() if mask & bit})}
    return {}


def query_gpu(fields: tuple[str, ...], *options: str) -> str | None:
    """The line that nvidia-smi prints for the fields; None if it is missing or rejects a field."""
    query = f"--query-gpu={','.join(fields)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None


def number(text: str) -> float | None:
    """The value of a field; None for '[N/A]'."""
    try:
        return float(text)
    except ValueError:
        return None
