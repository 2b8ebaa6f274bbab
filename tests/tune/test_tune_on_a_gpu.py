"""The tuner on a device: graphs and events, a poisoned context, a whole measurement."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.tune import cache, tuner
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.key import key_of
from nanovlm_fast.tune.measure import compare
from nanovlm_fast.tune.parts import Job, Parts
from nanovlm_fast.tune.search import LEFT_OUT
from nanovlm_fast.tune.timing import clock, reader
from nanovlm_fast.tune.tuner import tune
from tests.support.tuning import BUDGET, job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda")

# A kernel that asserts on the device, which makes the context useless; the others are plain.
POISON = """
import torch
from nanovlm_fast.model import ops
def poison(gate_up):
    wrong = torch.full((1,), 10**9, device=gate_up.device)
    torch.zeros(4, device=gate_up.device)[wrong] = 1
    torch.cuda.synchronize()
ops._kernel = lambda name: poison if name == "swiglu" else getattr(ops, name, None)
"""


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def on_the_gpu() -> Job:
    return dataclasses.replace(job("bfloat16", lm_n_blocks=2), device="cuda")


def a_key(compiled: str) -> dict[str, Any]:
    train = TrainConfig(compile=compiled)
    return key_of(on_the_gpu().model, train, BUDGET, GPU, torch.bfloat16, several=False)


def test_the_key_names_the_device_and_its_versions():
    key = a_key("none")
    assert key["SMs"] > 1 and key["cuda"] == torch.version.cuda
    assert key["driver"] and key["cudnn"] and key["triton"]


def test_a_captured_call_is_timed_by_the_devices_clock():
    x = torch.randn(2048, 2048, device=GPU)
    once = reader(lambda: x @ x, GPU)
    twice = reader(lambda: (x @ x, x @ x), GPU)
    compared = compare(once, twice, 0.99)
    assert 1.6 < compared.ratio < 2.4 and compared.slower
    assert 0.2e9 < clock() < 4e9


def test_what_a_captured_call_reads_lives_as_long_as_its_graph():
    """Once freed, it would be unmapped by the next capture: its replay is an illegal access."""
    x = torch.ones(4_000_000, device=GPU)
    watched = weakref.ref(x)
    read = reader(functools.partial(torch.add, x, 1.0), GPU)
    del x
    gc.collect()
    assert watched() is not None and read().seconds > 0
    del read
    gc.collect()
    assert watched() is None


def test_parts_compile_capture_and_replay():
    parts = Parts(on_the_gpu())
    for part in ("vision", "language", "ends", "blocks"):
        read = reader(parts.call(part, Choice(), mode="default"), GPU)
        assert 0 < read().seconds < 1
    assert 0 < reader(parts.update(Choice()), GPU, captured=False)().seconds < 1


def test_a_poisoned_context_is_the_other_processs(monkeypatch):
    monkeypatch.setattr(tuner, "SERVE", POISON + tuner.SERVE)
    monkeypatch.setattr("nanovlm_fast.model.ops._kernel", lambda name: None)
    monkeypatch.setattr(tuner, "gpu_candidates", only("swiglu"))
    entry = tune(on_the_gpu(), a_key("none"), Choice(), seconds=60.0)
    (row,) = entry.rows
    assert row.verdict == LEFT_OUT and row.why, row
    assert torch.ones(3, device=GPU).sum().item() == 3


def only(*names: str) -> Any:
    make = tuner.gpu_candidates
    return lambda *options: [each for each in make(*options) if each.name in names]


def test_a_whole_measurement_on_a_device():
    entry = tune(on_the_gpu(), a_key("default"), Choice(compile="default"), seconds=60.0)
    assert entry.done and entry.rows and cache.read(a_key("default")).rows == entry.rows
    wrong = [row for row in entry.rows if row.verdict == LEFT_OUT]
    assert not wrong, wrong
    timed = [row for row in entry.rows if row.seconds is not None]
    assert timed and all(0 < row.low <= row.high for row in timed)
