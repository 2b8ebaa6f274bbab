"""Threads leave cores that other processes keep busy; what the user has set stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from bench.cpu_threads import busy_processes
from nanovlm_fast import threads
from nanovlm_fast.threads import Load, busy_elsewhere, others_since_begin, threads_beside
from tests.support.processes import ROOT

CORES = len(os.sched_getaffinity(0))


def test_what_others_use_is_what_is_not_ones_own():
    before = Load(at=10.0, machine=500.0, own=3.0)
    assert busy_elsewhere(before, Load(12.0, 503.0, 4.0)) == 1.0
    assert busy_elsewhere(before, Load(12.0, 502.0, 5.5)) == 0.0  # rounding, never negative


@pytest.mark.parametrize(
    ("others", "kept", "cores", "expected"),
    [
        (0.0, 2, 2, 2),
        (0.4, 2, 2, 2),
        (1.0, 2, 2, 1),
        (2.0, 2, 2, 1),
        (3.2, 8, 16, 8),
        (60, 64, 64, 4),
    ],
)
def test_busy_cores_are_left_alone(others, kept, cores, expected):
    assert threads_beside(others, kept, cores) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
def test_real_processes_are_seen(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with busy_processes(1):
        time.sleep(0.2)
        monkeypatch.setattr(threads, "_start", threads.read_load())
        assert others_since_begin() is None, "too soon to tell"
        time.sleep(1.0)
        assert others_since_begin() > 0.3
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert others_since_begin() is None, "the user's number stays"


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2, reason="one core has one thread")
def test_a_run_beside_busy_processes_computes_with_fewer_threads(tmp_path):
    own = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "train.py", "--data", "synthetic", "--max-steps", "1"]
    command += ["--no-final-eval", "--workers", "0", "--out"]

    def said(name: str, *options: str) -> str:
        whole = [*command, str(tmp_path / name), *options]
        done = subprocess.run(whole, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
        return done.stdout

    with busy_processes(CORES):
        found = said("beside")
        assert "cores busy: computing with 1 of" in found
        assert "cpu (1 threads" in found
        assert "cores busy" not in said("deterministic", "--deterministic")
