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
from pathlib import Path
from typing import Any

import torch

from nanovlm_fast.device import device_name

ROOT = Path(__file__).resolve().parent / "results"


def facts(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to run it again."""
    values: dict[str, Any] = {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # a copy of the tree without its history says by the environment what it is a copy of
        "commit": os.environ.get("NANOVLM_FAST_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "clean": not _output("git", "status", "--porcelain", "--untracked-files=no"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    if device.type == "cuda":
        import triton

        values["triton"] = triton.__version__
        values["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return values


def _output(*command: str) -> str:
    try:
        where = Path(__file__).parent
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=where).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(name: str, device: torch.device, result: dict[str, Any], out: Path | None = None) -> Path:
    """Write <out or bench/results>/<device>/<name>.json, whole or not at all; returns the file."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    file = (out or ROOT) / slug / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps({**facts(device), **result}, indent=2) + "\n")
    os.replace(temporary, file)
    return file
