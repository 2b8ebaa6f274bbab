"""The versions of Triton that every kernel must compile with, and where the tests find them.

python -m tests.support.tritons [FOLDER]     install them (pip; about 650 MB and 10 s each)

Each version lies in a folder of its own, beside the environment: one that is put on PYTHONPATH
hides the installed one. The installed version needs no folder. FOLDER is the environment variable
NANOVLM_TRITONS, or a folder in the user's cache. CI sets the variable, and then a missing version
is an error; without it the tests of that version are skipped.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The Triton that a CUDA build of each supported PyTorch requires.
PAIRED = {"2.11": "3.6.0", "2.12": "3.7.0", "2.13": "3.7.1"}
# What `pip install triton` gives, as beside a CPU build of PyTorch.
NEWEST = "3.9.0"
VARIABLE = "NANOVLM_TRITONS"


def installed() -> str | None:
    """The version in this environment; None where there is none (not Linux)."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


VERSIONS = tuple(dict.fromkeys([*PAIRED.values(), NEWEST, installed() or NEWEST]))


def folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(VARIABLE) or cache / "nanovlm_fast" / "tritons")


def python_path(version: str) -> str:
    """What PYTHONPATH must be for `version`; skip the test, or fail it in CI, if it is missing."""
    if version == installed():
        return ""
    place = folder() / version
    if (place / "triton" / "__init__.py").exists():
        return str(place)
    missing = f"no Triton {version} in {place}: python -m tests.support.tritons"
    if os.environ.get(VARIABLE):
        pytest.fail(missing)
    pytest.skip(missing)


def install(version: str) -> None:
    """Install one version into its folder. Raises SystemExit with pip's last line if it fails."""
    place = folder() / version
    if (place / "triton" / "__init__.py").exists():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    command += [str(place), f"triton=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SystemExit(f"pip could not install triton=={version} into {place}: {lines[-1]}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.environ[VARIABLE] = sys.argv[1]
    for wanted in VERSIONS:
        if wanted != installed():
            install(wanted)
            print(f"triton {wanted}: {folder() / wanted}")
