"""Result files: what was measured, and on what, with which versions, at which commit, by which command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.machine import WATCH, query_gpu
from nanovlm_fast.device import device_name

ROOT = Path(__file__).resolve().parent / "results"
SCHEMA = 1  # of what `facts` and the rows of times look like; a file without it is of schema 1
NEEDED = ("device", "date", "commit", "command", "python", "torch")


def facts(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to run it again."""
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # a copy of the tree without its history says by the environment what it is a copy of
        "commit": os.environ.get("NANOVLM_FAST_COMMIT") or _output("git", "rev-parse", "HEAD"),
        # results are no code: those of the stage before do not make the next one's tree another
        "clean": not _output(
            "git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results"
        ),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    if device.type == "cuda":
        import triton

        values["triton"] = triton.__version__
        values["driver"] = query_gpu(("driver_version",)) or _loaded_driver()
    if seen := WATCH.record():
        values["machine"] = seen
    return values


def _output(*command: str) -> str:
    try:
        where = Path(__file__).parent
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=where).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _loaded_driver() -> str:
    """Where nvidia-smi is missing: the version of the kernel's module."""
    try:
        found = re.search(r"\s(\d+\.\d+[\d.]*)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found.group(1) if found else "unknown"


def place(name: str, device: torch.device, out: Path | None = None) -> Path:
    """<out or bench/results>/<device>/<name>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return (out or ROOT) / slug / f"{name}.json"


def write(name: str, device: torch.device, result: dict[str, Any], out: Path | None = None) -> Path:
    """Write the result to its `place`, whole or not at all; returns the file. Raises as `write_file`."""
    return write_file(place(name, device, out), {"suite": name, **facts(device), **result})


def write_file(file: Path, result: dict[str, Any]) -> Path:
    """Replace the file by the result in one go: what was there before stays if anything fails, a full disk too.

    Raises OSError if it cannot be written, and ValueError if the file there is none of this version's results.
    """
    if file.exists():
        read(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}; what was there before is untouched", str(file)) from error
    return file


def read(file: Path) -> dict[str, Any]:
    """A result file as it is. Raises OSError, and ValueError if it is none, or of a schema not known here."""
    try:
        result = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{file} is no result file")
    if (schema := result.get("schema", SCHEMA)) != SCHEMA:
        raise ValueError(
            f"{file} is of schema {schema}, this version knows {SCHEMA}: move it away, or use another --out"
        )
    return result


def load(file: Path) -> dict[str, Any]:
    """`read`, and a ValueError if the file does not say where it comes from."""
    result = read(file)
    needed = (*NEEDED, "driver", "triton") if "NVIDIA" in str(result.get("device")) else NEEDED
    if missing := [name for name in needed if not result.get(name) or result[name] == "unknown"]:
        raise ValueError(f"{file}: no {', '.join(missing)}")
    return result


def measurements(result: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(names on the way, row) of everything in a result that was timed: rows with a `median`, in seconds."""
    if isinstance(result, dict):
        if isinstance(result.get("median"), (int, float)):
            yield path, result
        for name, value in result.items():
            yield from measurements(value, (*path, name))
