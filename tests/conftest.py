"""Shared pieces of the tests: a small model and random packed batches."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is imported: on a CPU they run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job: what it starts ignores it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: threads of theirs would wait for each other
    torch.set_num_threads(1)

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.packing import IGNORE, Document, Sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `pytest -n auto`: workers that share a GPU share its memory too."""
    return min(os.cpu_count() or 1, 6 if torch.cuda.is_available() else 16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: no worker has one left when the others are through."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def run_python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python process in the repository root, on one thread; what it printed and its exit code."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **env}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


SMALL = dict(
    vit_img_size=32,
    vit_patch_size=8,
    vit_hidden_dim=48,
    vit_inter_dim=96,
    vit_n_heads=3,
    vit_n_blocks=2,
    lm_hidden_dim=48,
    lm_inter_dim=80,
    lm_n_heads=6,
    lm_n_kv_heads=2,
    lm_n_blocks=3,
    lm_vocab_size=97,
    lm_max_position_embeddings=512,
    mp_pixel_shuffle_factor=2,
    image_mean=0.4,
    image_std=0.3,
)


@pytest.fixture
def small_config() -> VLMConfig:
    return VLMConfig(**SMALL)


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if request.node.get_closest_marker("gpu"):
        torch._dynamo.reset()  # one function compiled for many sizes would run into its limit of recompilations


def random_document(rng: np.random.Generator, config: VLMConfig, n_images: int, text: int) -> Document:
    """`n_images` images first, then `text` random tokens, the last few of them labelled."""
    n = n_images * config.image_tokens
    ids = np.concatenate([np.zeros(n, np.int64), rng.integers(0, config.lm_vocab_size, text)])
    rows = np.concatenate([np.arange(n), np.full(text, -1)]).astype(np.int32)
    labels = np.full(len(ids), IGNORE, np.int64)
    answer = int(rng.integers(1, text)) if text > 1 else 0
    if answer:
        labels[-answer - 1 : -1] = ids[-answer:]
    return Document(ids, rows, labels)


def random_sample(
    rng: np.random.Generator, config: VLMConfig, n_images: int, n_documents: int = 1, name: str = "sample"
) -> Sample:
    size = config.vit_img_size
    images = rng.integers(0, 256, (n_images, 3, size, size)).astype(np.uint8)
    documents = [random_document(rng, config, n_images, int(rng.integers(2, 20))) for _ in range(n_documents)]
    return Sample(name, images, documents)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run from start to end, started as users do. Tests that change it take a copy."""
    from runs import arguments

    out = tmp_path_factory.mktemp("finished") / "run"
    result = run_python(*arguments(out, "--epochs 3 --eval-every 5"))
    assert result.returncode == 0, result.stderr
    return out, result


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
