"""What a run takes: from its options, its own past, the cache, or a measurement; on all ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.model.compiling import INDUCTOR, compiled, inductor_names
from nanovlm_fast.ranks import World
from nanovlm_fast.runs import load_run_config
from nanovlm_fast.training.setup import Run
from nanovlm_fast.tune import cache
from nanovlm_fast.tune import key as key_module
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.key import key_of
from nanovlm_fast.tune.search import Found
from nanovlm_fast.tune.settle import Settled, settle
from tests.support.processes import ROOT, run_python
from tests.support.runs import TINY, trainer
from tests.support.tuning import BUDGET

GPU = torch.device("cuda")
CPU = torch.device("cpu")
FAST = Choice(("rms_norm",), compile="default")
KEY: dict[str, Any] = {"device": "an H100", "set": {"kernels": "auto", "compile": "auto"}}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


class Measuring:
    """A measurement that finds `FAST`, and counts how often it was made."""

    def __init__(self, error: Exception | None = None):
        self.times = 0
        self.error = error
        self.known: Entry | None = None

    def __call__(self, key: dict[str, Any], plain: Choice, before: Entry | None) -> Entry:
        self.times += 1
        self.known = before
        if self.error:
            raise self.error
        entry = Entry.of(key, plain, Found(FAST, done=True), 1.0)
        cache.write(entry)
        return entry


def settled(
    measuring: Measuring, device: torch.device = GPU, record: dict | None = None, **options: Any
) -> Settled:
    config = TrainConfig(**{"compile": "auto", **options})
    return settle(config, device, World(), KEY, measuring, record)


def test_a_gpu_measures_once_and_takes_it_from_the_cache_afterwards(capsys):
    measuring = Measuring()
    first = settled(measuring)
    assert "tuned for an H100" in capsys.readouterr().out
    second = settled(measuring)
    assert measuring.times == 1 and first.choice == second.choice == FAST
    assert second.how.startswith("tuned on 20") and second.how.endswith("--kernels rms_norm")
    config = second.apply(TrainConfig(compile="auto"))
    assert (config.kernels, config.compile, config.inductor) == ("rms_norm", "default", "none")


def test_what_the_user_has_set_stays():
    given = TrainConfig(kernels="swiglu", compile="none", inductor="none", attention="sdpa")
    config = settled(Measuring()).apply(given)
    assert dataclasses.replace(config, vision_attention="auto") == given


def test_off_is_plain_and_so_is_deterministic():
    measuring = Measuring()
    settled(measuring)
    for options in ({"tune": "off"}, {"deterministic": True}):
        found = settled(measuring, **options)
        assert found.choice == Choice(compile="default") and not found.tuned and not found.how
    assert measuring.times == 1
    with pytest.raises(ValueError, match="--deterministic takes nothing that is measured"):
        settled(measuring, deterministic=True, tune="again")


def test_again_measures_again_and_knows_what_failed():
    measuring = Measuring()
    settled(measuring, tune="again")
    settled(measuring, tune="again")
    assert measuring.times == 2 and measuring.known == cache.read(KEY)


def test_a_cpu_measures_only_when_it_is_told_to():
    measuring = Measuring()
    assert settled(measuring, CPU).choice == Choice() and measuring.times == 0
    assert settled(measuring, CPU, tune="again").tuned and measuring.times == 1
    assert settled(measuring, CPU).choice == FAST and measuring.times == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), OSError("full"), TypeError("a defect of ours")]
)
def test_a_measurement_that_fails_is_a_warning(error, capsys):
    found = settled(Measuring(error))
    assert found.choice == Choice(compile="default") and not found.tuned
    said = capsys.readouterr().out.strip()
    assert said == f"warning: --tune failed, plain PyTorch takes its place: {error}"


def test_a_measurement_that_was_interrupted_is_made_again():
    cache.write(Entry.of(KEY, Choice(), Found(FAST, measuring="swiglu"), 1.0))
    measuring = Measuring()
    settled(measuring)
    assert measuring.times == 1
    assert measuring.known.left_out() == {"swiglu": "the process that timed it died"}


def test_a_resumed_run_repeats_its_choice_whatever_the_cache_says():
    measuring = Measuring()
    settled(measuring)
    own = Settled(Choice(("swiglu",)), "an H100", tuned=True)
    assert settled(measuring, record=own.record).choice == Choice(("swiglu",))
    # A run that was not tuned stays so, and so does one of a version that noted nothing.
    for record in ({"device": "an H100", "choice": None}, {}):
        assert settled(measuring, record=record).choice == Choice(compile="default")
    # On another device it is what that one takes.
    assert settled(measuring, record={**own.record, "device": "an A100"}).choice == FAST
    assert settled(measuring, record=own.record, tune="again").choice == FAST
    assert settled(measuring, record=own.record, deterministic=True).choice == own.choice
    assert settled(measuring, record=own.record, tune="off").choice == Choice(compile="default")


def test_several_processes_resume_a_run_of_one_without_its_graphs():
    """build() refuses CUDA graphs with several processes, and nobody asked for them here."""
    graphs = dataclasses.replace(FAST, compile="reduce-overhead")
    record = {"device": KEY["device"], "choice": graphs.to_json()}
    options = TrainConfig(compile="auto")
    alone = settle(options, GPU, World(), KEY, Measuring(), record)
    assert alone.choice == graphs
    two = settle(options, GPU, World(size=2), KEY, Measuring(), record)
    assert two.choice == FAST and two.record["choice"] == FAST.to_json()


def test_a_noted_choice_that_is_not_known_here_is_a_warning(capsys):
    record = {"device": "an H100", "choice": {**FAST.to_json(), "kernels": ["of_tomorrow"]}}
    assert settled(Measuring(), record=record).choice == Choice(compile="default")
    assert "it names of_tomorrow" in capsys.readouterr().out


@pytest.mark.parametrize("name", INDUCTOR)
def test_this_torch_knows_every_option_of_the_compiler(name):
    """torch.compile refuses an unknown one when it is called."""
    assert compiled(torch.neg, "default", (name,)) is not torch.neg
    assert compiled(torch.neg, "none", (name,)) is torch.neg
    (field,) = (f for f in dataclasses.fields(TrainConfig) if f.name == "inductor")
    assert name in field.metadata["help"] and inductor_names(f"{name},{name}") == (name,)
    with pytest.raises(ValueError, match="--inductor fast: there are auto, none, combo_kernels"):
        inductor_names(f"fast,{name}")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from nanovlm_fast.model.ops import choose_ops
try:
    choose_ops("swiglu")
except ValueError as error:
    print(error)
"""


def test_a_kernel_without_triton_says_what_to_do():
    said = run_python("-c", WITHOUT_TRITON).stdout
    assert said.startswith("--kernels swiglu needs Triton, which does not load here (")
    assert said.endswith("): pip install triton, or --kernels none\n")


# ---- in real runs


def tuned_cpu(config: TrainConfig, model: VLMConfig, choice: Choice) -> None:
    """Put a choice for this CPU and this run into the cache."""
    key = key_of(model, config, None, CPU, torch.float32, several=False)
    cache.write(Entry.of(key, Choice(), Found(choice, done=True), 1.0))


def test_a_run_writes_its_choice_down_and_a_resume_repeats_it(loop, tmp_path, caches, capsys):
    out = tmp_path / "run"
    options = ["--workers", "-1", "--compile", "auto", "--max-steps", "1"]
    options += ["--val-samples", "0", "--hang-timeout", "0"]
    model, config = parse_config([*TINY, *options, "--out", str(out)])
    chosen = Choice(compile="none", threads=1, workers=0)
    tuned_cpu(config, model, chosen)
    run = loop.Trainer(model, config)
    assert (run.config.workers, run.config.compile, run.config.kernels) == (0, "none", "none")
    run.train()
    assert "tuned on 20" in capsys.readouterr().out
    written = json.loads((out / "config.json").read_text())
    assert written["tuned"] == {"device": run.settled.device, "choice": chosen.to_json()}
    # The options are kept as they were given; the workers are the run's from here on.
    kept = load_run_config(out)
    assert (kept["kernels"], kept["compile"], kept["workers"]) == ("auto", "auto", 0)

    for file in caches.rglob("*.json"):
        file.unlink()
    again = loop.Trainer(*parse_config(["--resume", "--out", str(out), "--max-steps", "2"]))
    assert again.settled.choice == chosen and "as this run was tuned" in again.settled.how
    assert json.loads((out / "config.json").read_text())["tuned"] == written["tuned"]


def test_a_run_computes_in_the_type_that_was_measured_faster(loop, tmp_path, caches, monkeypatch):
    monkeypatch.setattr(key_module, "has_fast_bfloat16", lambda: True)
    options = ["--workers", "1", "--max-steps", "1", "--val-samples", "0", "--hang-timeout", "0"]

    def run(name: str, *more: str) -> Run:
        return loop.Trainer(*parse_config([*TINY, *options, "--out", str(tmp_path / name), *more]))

    assert run("before").dtype == torch.float32, "nothing was measured"
    model, config = parse_config([*TINY, *options])
    tuned_cpu(config, model, Choice(dtype="bfloat16"))
    assert run("set", "--dtype", "float32").dtype == torch.float32
    tuned = run("tuned")
    with tuned.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == tuned.dtype == torch.bfloat16
    tuned.train()
    # Another CPU may decide otherwise, and this one repeats what it did.
    assert load_run_config(tmp_path / "tuned")["dtype"] == "auto"
    for file in caches.rglob("*.json"):
        file.unlink()
    again = ["--resume", "--out", str(tmp_path / "tuned"), "--max-steps", "2"]
    assert loop.Trainer(*parse_config(again)).dtype == torch.bfloat16
    float32 = loop.Trainer(*parse_config([*again, "--dtype", "float32"]))
    assert float32.dtype == torch.float32


def test_what_older_versions_noted_has_no_type():
    older = Choice(threads=1, workers=0).to_json()
    del older["dtype"]
    assert Choice.from_json(older) == Choice(threads=1, workers=0)
    with pytest.raises(ValueError, match="float8"):
        Choice.from_json({**older, "dtype": "float8"})


def test_an_untuned_run_notes_that(loop, tmp_path):
    out = tmp_path / "run"
    run = trainer(loop, out, "--tune off --val-samples 0")
    assert json.loads((out / "config.json").read_text())["tuned"]["choice"] is None
    assert run.settled.choice == Choice()


def test_the_watchdog_sleeps_while_a_run_is_tuned(tmp_path, monkeypatch):
    limits = []
    settle_of = Run._settle

    def noted(self: Run, *arguments: Any) -> TrainConfig:
        limits.append(self.watchdog.limit)
        return settle_of(self, *arguments)

    monkeypatch.setattr(Run, "_settle", noted)
    out = str(tmp_path / "run")
    options = ["--val-samples", "0", "--hang-timeout", "0", "--workers", "0", "--out", out]
    Run(*parse_config([*TINY, *options]))
    assert limits == [math.inf, math.inf]


RANK = """
import json, sys
import torch
from nanovlm_fast.config import TrainConfig
from nanovlm_fast.ranks import World
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.search import Found
from nanovlm_fast.tune.settle import settle

world = World.join("cpu")

def measure(key, plain, before):
    assert world.first, "the second rank measures"
    return Entry.of(key, plain, Found(Choice(("rms_norm",)), done=True), 1.0)

config = TrainConfig(tune="again")
key = {"device": "a CPU", "set": {}}
found = settle(config, torch.device("cpu"), world, key, measure)
print(json.dumps(found.record))
world.leave()
"""


def test_the_first_of_two_ranks_measures_and_tells_the_other(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        environment = {
            **os.environ,
            **dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", TORCHELASTIC_RUN_ID="one"),
            **dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1"),
            "XDG_CACHE_HOME": str(tmp_path / rank),
        }
        command = [sys.executable, "-c", RANK]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    records = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert records[0] == records[1] and records[0]["choice"]["kernels"] == ["rms_norm"]


def test_the_key_of_a_gpus_run_has_its_budgets_and_no_workers(monkeypatch):
    monkeypatch.setattr(key_module, "has_fast_bfloat16", lambda: False)
    key = key_of(VLMConfig(), TrainConfig(), BUDGET, CPU, torch.float32, several=False)
    assert key["budget"] == dataclasses.asdict(BUDGET)
    assert set(key["set"]) == {"compile", "workers"}
