"""How many loader workers a run takes if it is not told, and what it says if they are too few."""

from __future__ import annotations

import json
import os
import re
import time

import pytest

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data import workers
from nanovlm_fast.data.sources.example import Subset
from nanovlm_fast.data.workers import usable_cores, workers_for
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting.journal import Journal
from nanovlm_fast.reporting.metrics import read_metrics
from nanovlm_fast.runs import RunState
from tests.support.runs import trainer


@pytest.fixture(autouse=True)
def no_quota(tmp_path, monkeypatch):
    """The limits of the container that the tests run in are not theirs."""
    monkeypatch.setattr(workers, "CGROUP", tmp_path / "no cgroup")


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 2), (16, 1, 14), (64, 1, 16), (112, 8, 12), (8, 8, 1)],
)
def test_a_gpu_gets_the_cores_that_its_process_may_use(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert workers_for(on_gpu=True, processes=processes) == expected
    assert workers_for(on_gpu=False, processes=processes) == 1


@pytest.mark.parametrize(
    ("own", "parents", "processes", "expected"),
    [
        (16, 128, 8, 14),  # bound to cores of its own, as Slurm does
        (64, 128, 8, 14),  # bound to the half that four processes share
        (16, 16, 8, 1),  # torchrun in a container of 16 cores
    ],
)
def test_cores_of_its_own_are_not_divided(monkeypatch, own, parents, processes, expected):
    cores = {0: own, os.getppid(): parents}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores[pid])))
    assert workers_for(on_gpu=True, processes=processes) == expected


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "600000 100000\n"}, 6),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "650000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(workers, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert usable_cores() == cores
    assert workers_for(on_gpu=True) == max(1, min(16, cores - 2))
    assert workers_for(on_gpu=True, processes=2) == max(1, min(16, cores // 2 - 2))


def test_the_number_that_was_taken_is_the_runs(loop, tmp_path, capsys, monkeypatch):
    """Its checkpoints count on that many shards, wherever the run is resumed."""
    monkeypatch.setattr("nanovlm_fast.training.setup.workers_for", lambda on_gpu, processes: 3)
    begun = trainer(loop, tmp_path / "run", "--workers -1 --max-steps 2")
    assert len(begun.stream.states) == 3
    assert "loader workers: 3 · cores: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["workers"] == 3


def test_torchruns_count_for_this_machine_is_read(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(ValueError, match=r"\$LOCAL_WORLD_SIZE must be a whole number"):
        World.join("cpu")


class Slow(Subset):
    """A source that takes its time over every example."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


def test_a_slow_source_is_noticed_once_with_what_to_do(loop, tmp_path, capsys):
    slowed = trainer(loop, tmp_path / "run", "--max-steps 8 --log-every 2 --no-final-eval")
    load = slowed.stream.load
    load.source = Slow(load.source, range(len(load.source)))
    load.cache.clear()  # else what was read for the budgets, and later epochs, would be fast
    load.cache_room = 0
    slowed.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "waiting for data" in line]
    assert len(said) == 1
    metrics = read_metrics(tmp_path / "run")
    waits = {line["step"]: line["data_wait"] for line in metrics if "data_wait" in line}
    assert waits[4] > 0.2
    assert said[0].startswith(f"step 4: {waits[4]:.0%} of the last interval was waiting for data")
    command = re.search(r"\((python -m [^;]*);", said[0]).group(1)
    assert command == (
        "python -m nanovlm_fast.data.prepare --preset tiny --data synthetic:32 --out DIR"
    )
    assert "more --workers than 0" in said[0]


def test_a_short_wait_or_a_slow_start_is_not(tmp_path, capsys):
    config = TrainConfig(data="prepared:shards", workers=14)
    journal = Journal(tmp_path, VLMConfig(), config, RunState(step=5), World())
    for journal.intervals, share in ((1, 0.9), (2, 0.05), (3, 0.051), (4, 0.9)):
        journal.note_data_wait(share)
    (line,) = capsys.readouterr().out.splitlines()
    advice = "a new run can take more --workers than 14"
    assert line == f"step 5: 5% of the last interval was waiting for data: {advice}"
