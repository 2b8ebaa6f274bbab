"""Result files: what was measured, on which device, with which versions, commit and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.harness.commit import UNKNOWN, changed, commit
from bench.harness.machine import WATCH, query_gpu
from nanovlm_fast.device import device_name
from nanovlm_fast.threads import WAITING

ROOT = Path(__file__).resolve().parent.parent / "results"
# Version of the layout of `facts` and of rows of times; a file without the entry has version 1.
SCHEMA = 1
# Without these a number cannot be traced to what produced it; `load` refuses such a file.
NEEDED = ("device", "date", "commit", "command", "python", "torch")
# Results and texts are no code: those of one stage of gpu_all.sh must not make the tree of the next
# one count as changed.
CODE = (":/", ":(top,exclude)bench/results", ":(top,exclude,glob)**/*.md")


def facts(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs in order to repeat the measurement."""
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "clean": not changed(*CODE),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    if device.type == "cpu":
        # How threads wait for each other, which our commands set. {}: as OpenMP does by itself
        values["openmp"] = {name: os.environ[name] for name in WAITING if name in os.environ}
    if device.type == "cuda":
        import triton

        values["triton"] = triton.__version__
        values["driver"] = query_gpu(("driver_version",)) or _loaded_driver()
    if seen := WATCH.record():
        values["machine"] = seen
    return values


def _loaded_driver() -> str:
    """The driver's version from its kernel module, for machines without nvidia-smi."""
    try:
        found = re.search(r"\s(\d+\.\d+[\d.]*)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found.group(1) if found else UNKNOWN


def place(name: str, device: torch.device, out: Path | None = None) -> Path:
    """<out or bench/results>/<device>/<name>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return (out or ROOT) / slug / f"{name}.json"


def write(name: str, device: torch.device, result: dict[str, Any], out: Path | None = None) -> Path:
    """Write the result to its `place`, whole or not at all; return the file.

    Raises the errors of `write_file`.
    """
    return write_file(place(name, device, out), {"suite": name, **facts(device), **result})


def write_file(file: Path, result: dict[str, Any]) -> Path:
    """Replace the file by the result at once; if anything fails, the old file stays.

    Raises OSError if it cannot be written, and ValueError if the existing file is not a result of
    this version.
    """
    if file.exists():
        read(file)  # refuses to overwrite what is not a result file
    # Written beside the file and then renamed: a full disk or a kill leaves no half-written result.
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = f"{error.strerror}; what was there before is untouched"
        raise OSError(error.errno, why, str(file)) from error
    return file


def read(file: Path) -> dict[str, Any]:
    """A result file as it is.

    Raises OSError, or ValueError if it is not a result file or has an unknown schema.
    """
    try:
        result = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{file} is not a result file")
    if (schema := result.get("schema", SCHEMA)) != SCHEMA:
        raise ValueError(
            f"{file} is of schema {schema}, this version knows {SCHEMA}: "
            "move it away, or use another --out"
        )
    return result


def load(file: Path) -> dict[str, Any]:
    """`read`, and a ValueError if the file does not say where its numbers come from."""
    result = read(file)
    needed = (*NEEDED, "driver", "triton") if "NVIDIA" in str(result.get("device")) else NEEDED
    if missing := [name for name in needed if not result.get(name) or result[name] == UNKNOWN]:
        raise ValueError(f"{file}: no {', '.join(missing)}")
    return result


def measurements(
    result: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(path of names, row) for every timed row of a result: those with a `median`, in seconds."""
    if isinstance(result, dict):
        if isinstance(result.get("median"), (int, float)):
            yield path, result
        for name, value in result.items():
            yield from measurements(value, (*path, name))
