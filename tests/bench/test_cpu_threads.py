"""bench.cpu_threads measures real commands; a run that stands still counts as standing still."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bench import cpu_threads
from bench.cpu_threads import SETTINGS, busy_processes, environment, main, names_of
from bench.harness.results import facts


def test_a_setting_replaces_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = environment(SETTINGS["spin-0"])
    assert found["GOMP_SPINCOUNT"] == "0"
    assert not {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"} & set(found)


def test_a_result_of_a_cpu_says_how_threads_waited(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "123")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert facts(torch.device("cpu"))["openmp"] == {"GOMP_SPINCOUNT": "123"}


def test_busy_processes_compute_and_end_with_the_block():
    started = []
    popen = subprocess.Popen

    class Noted(popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Noted)
        with busy_processes(2):
            time.sleep(0.5)
            stats = [Path(f"/proc/{each.pid}/stat").read_text() for each in started]
    assert len(started) == 2
    ticks = [int(stat.split()[13]) for stat in stats]  # of user time
    assert min(ticks) > 2, "they did not compute"
    assert all(each.returncode is not None for each in started)


def test_unknown_names_are_refused(capsys):
    assert main(["--measure", "train,sleep"]) == 1
    assert "--measure sleep: there are train, evaluate" in capsys.readouterr().err
    assert main(["--settings", "ours,ours"]) == 1
    assert "--settings names ours twice" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--settings fast: there are unset"):
        names_of("fast", tuple(SETTINGS), "--settings")


@pytest.mark.slow
def test_readings_of_real_commands(tmp_path):
    options = ["--busy", "0", "--rounds", "1", "--settings", "one-thread", "--out", str(tmp_path)]
    assert main(["--seconds", "4", *options]) == 0
    assert main(["--measure", "generate", *options]) == 0
    files = {file.stem: json.loads(file.read_text()) for file in tmp_path.rglob("*.json")}
    assert set(files) == {"cpu_threads_train", "cpu_threads_generate"}
    readings = {name: file["readings"] for name, file in files.items()}
    (tokens_per_s,) = readings["cpu_threads_train"]["train"]["0 busy"]["one-thread"]
    assert 100 < tokens_per_s < 1e7
    (seconds,) = readings["cpu_threads_generate"]["generate"]["0 busy"]["one-thread"]
    assert seconds > 0.5


def test_a_run_that_ends_early_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_threads, "TRAIN", tmp_path / "missing.py")
    with pytest.raises(RuntimeError, match=r"train\.py logged nothing"):
        cpu_threads.training_rate(SETTINGS["ours"], [], 1.0)


def lines(*seconds: float) -> list[dict]:
    """Log lines at these times, at 1,000 tokens/s."""
    return [{"seconds": at, "tokens_per_s": 1000.0} for at in seconds]


def test_a_rate_ends_with_the_last_line_unless_the_run_stands_still():
    assert cpu_threads.rate_of(lines(0, 1, 2, 3), took=3.9) == 1000
    assert cpu_threads.rate_of(lines(0, 1, 2, 3), took=30) == 100
    assert cpu_threads.rate_of(lines(0), took=30) == 0
    assert cpu_threads.rate_of([], took=30) == 0
