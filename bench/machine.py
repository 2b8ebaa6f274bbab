"""What the machine does while times are taken, read and never set: clocks, power, temperature, who else computes."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import torch

BUSY = 0.1  # share of the CPUs that others may use before a result says so
GPU_FIELDS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
REASONS = "clocks_event_reasons.active", "clocks_throttle_reasons.active"  # of newer and of older drivers
SLOWED = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal", 0x40: "thermal", 0x80: "power brake"}  # NVML's


class Watch:
    """Used as a context around everything that is timed; `record` is what a result file keeps of it."""

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
        """Load average and MHz of the CPU; of a GPU that this process uses what nvidia-smi says."""
        values: dict = {"load_average": os.getloadavg()[0], "cpu_mhz": cpu_mhz()}
        if torch.cuda.is_initialized():
            values["gpu"] = gpu_reading()
            self.slowed |= set(values["gpu"].get("slowed", ()))
        return values

    def record(self) -> dict | None:
        """{before, after, seconds, others_cpus, warnings}; None if nothing was timed."""
        if self.before is None:
            return None
        cpus, warnings = os.cpu_count() or 1, []
        others = self.others / self.seconds if self.seconds > 0.5 else 0.0  # counted in hundredths of a second
        if others > BUSY * cpus:
            warnings.append(f"other processes used {others:.1f} of the {cpus} CPUs meanwhile")
        if self.slowed:
            warnings.append(f"the GPU slowed down: {', '.join(sorted(self.slowed))}")
        times = {"seconds": self.seconds, "others_cpus": others, "warnings": warnings}
        return {"before": self.before, "after": self.after, **times}


WATCH = Watch()


def cpu_seconds() -> tuple[float, float]:
    """CPU time that the whole machine used, and this process with its process group (workers): Linux, else zeros."""
    try:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0, 0.0
    own, group = 0, str(os.getpgrp())
    for place in os.scandir("/proc"):
        if place.name.isdigit():
            try:
                after_name = Path(place.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if after_name[2] == group:
                own += sum(map(int, after_name[11:15]))  # its own, and of children that it waited for
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - fields[3] - fields[4]) / tick, own / tick  # without idle and waiting for disks


def cpu_mhz() -> float | None:
    """Mean over the CPUs."""
    try:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return sum(map(float, found)) / len(found) if found else None


def gpu_reading() -> dict:
    """MHz, watts and degrees Celsius of this process's GPU, and `slowed`: why its clocks were held back just now."""
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    for reasons in REASONS:
        text = query_gpu((*GPU_FIELDS, reasons), gpu)
        if text is None:
            continue
        *numbers, active = (part.strip() for part in text.split(","))
        values: dict = {name: number(value) for name, value in zip(GPU_FIELDS, numbers, strict=True)}
        mask = int(active, 16) if active.startswith("0x") else 0
        return {**values, "slowed": sorted({why for bit, why in SLOWED.items() if mask & bit})}
    return {}


def query_gpu(fields: tuple[str, ...], *options: str) -> str | None:
    """nvidia-smi's line for the fields; None where it is missing or does not know one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None


def number(text: str) -> float | None:
    """None for '[N/A]'."""
    try:
        return float(text)
    except ValueError:
        return None
