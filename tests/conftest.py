"""Shared pieces of the tests: a small model and random packed batches."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # before any kernel is imported: on a CPU they run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell's background job: what it starts ignores it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # as many workers as cores: threads of theirs would wait for each other
    torch.set_num_threads(1)

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model.ops import choose_ops
from tests.support.processes import ROOT, run_python
from tests.support.samples import SMALL
from tests.support.shared import shared_folder

if importlib.util.find_spec("triton"):
    # Kernels note at their import whether they are interpreted: a test that takes the variable away
    # must not be the first to import them.
    choose_ops("all")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `pytest -n auto`: workers that share a GPU share its memory too."""
    return min(os.cpu_count() or 1, 6 if torch.cuda.is_available() else 16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: no worker has one left when the others are through."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def small_config() -> VLMConfig:
    return VLMConfig(**SMALL)


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    # What the code under test has set would reach the processes that later tests start. Those are
    # no forks then: `forks.run` starts Python anew for another environment.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if request.node.get_closest_marker("gpu"):
        # one function compiled for many sizes would reach the limit of recompilations
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run from start to end, started as users do. Tests that change it take a copy."""
    from tests.support.runs import arguments

    def make(folder: Path) -> None:
        result = run_python(*arguments(folder / "run", "--epochs 3 --eval-every 5"))
        assert result.returncode == 0, result.stderr
        (folder / "printed.json").write_text(
            json.dumps([result.args, result.stdout, result.stderr])
        )

    folder = shared_folder(tmp_path_factory, "finished", make)
    command, *printed = json.loads((folder / "printed.json").read_text())
    return folder / "run", subprocess.CompletedProcess(command, 0, *printed)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "copy", symlinks=True)


@pytest.fixture(scope="session")
def loop():
    """train.py as a module."""
    spec = importlib.util.spec_from_file_location("train_py", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
