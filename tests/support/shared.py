"""Folders that all processes of one test run share, as the workers of pytest-xdist are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from pytest import TempPathFactory


def shared_folder(factory: TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of that name, which `make` fills for the first process that asks for it.

    `make` gets a folder that does not exist yet. The others wait until it is filled, so this is for
    what takes longer to make than to wait for.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in it
    folder = root / name
    filled = root / f"{name}.filled"
    with FileLock(root / f"{name}.lock"):
        if not filled.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed in the middle
            make(folder)
            filled.touch()
    return folder
