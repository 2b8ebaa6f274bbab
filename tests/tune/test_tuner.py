"""The tuner on a real model at toy sizes: real gate, real processes, the CPU's own clock."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.model import ops
from nanovlm_fast.model.ops import KERNELS
from nanovlm_fast.tune import cache, tuner
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.key import GPU_AUTOS, key_of
from nanovlm_fast.tune.measure import Comparison, Read, Reading, Unsettled
from nanovlm_fast.tune.search import LEFT_OUT, TAKEN, WHOLE, Fails, Found
from nanovlm_fast.tune.tuner import DeviceBench, tune, tune_apart
from tests.support.processes import ROOT
from tests.support.tuning import BUDGET, job

# A kernel that hangs, one that aborts, one that raises, one that is off by 1%, one that is wrong
# only in a second run; all others are plain functions.
PLANTED = """
import os, time
from nanovlm_fast.model import ops
times = []
def hang(*args): time.sleep(600)
def abort(*args): os.abort()
def fail(*args): raise RuntimeError("no kernel image is available")
def off(*args): return tuple(1.01 * out for out in ops.rotary(*args))
def forgets(x, weight, eps, residual=None):
    times.append(1)
    out = ops.rms_norm(x, weight, eps * (1 + len(times)), residual)
    return out
bad = {"rotary": off, "swiglu": hang, "pixel_shuffle_proj": abort, "linear_cross_entropy": fail}
bad["rms_norm"] = forgets
ops._kernel = lambda name: bad.get(name) or getattr(ops, name, None)
"""
BAD = ("rotary", "swiglu", "pixel_shuffle_proj", "linear_cross_entropy", "rms_norm")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def a_key() -> dict[str, Any]:
    """A GPU's, as far as the options go that are left to the tuner."""
    place = torch.device("cpu"), torch.float32
    return {**key_of(job().model, TrainConfig(), BUDGET, *place, False), "set": {**GPU_AUTOS}}


@pytest.mark.slow
def test_bad_kernels_are_left_out_named_and_remembered(monkeypatch):
    monkeypatch.setattr(tuner, "SERVE", PLANTED + tuner.SERVE)
    monkeypatch.setattr(tuner, "GATE_SECONDS", 12.0)
    timed: list[str] = []
    same = planted({})

    def noted(self: DeviceBench, base: Choice, choice: Choice, *rest: Any) -> Comparison:
        timed.extend(choice.kernels)
        return same(self, base, choice, *rest)

    monkeypatch.setattr(DeviceBench, "compare", noted)
    entry = tune(job(), a_key(), Choice(), seconds=200.0)
    assert set(timed) == set(KERNELS) - set(BAD), "only those that the gate let through are timed"
    reasons = {row.name: row.why for row in entry.rows if row.verdict == LEFT_OUT}
    assert reasons.keys() == set(BAD), reasons
    assert reasons["swiglu"] == "no answer within 12 s"
    assert reasons["pixel_shuffle_proj"].startswith("died of SIGABRT")
    assert reasons["linear_cross_entropy"] == "RuntimeError: no kernel image is available"
    assert "error" in reasons["rotary"] and "second run" in reasons["rms_norm"]
    assert not set(BAD) & set(entry.choice.kernels)
    # Kept for this key: the next measurement does not try them.
    assert cache.read(a_key()).rows == entry.rows
    assert cache.read(a_key()).left_out() == reasons


@pytest.mark.slow
def test_real_kernels_in_the_interpreter(monkeypatch):
    """Every kernel passes the gate in a process of its own, is timed, and loses, as it must."""
    monkeypatch.setattr(tuner, "PAIRS", 5)
    entry = tune(job(), a_key(), Choice(), seconds=200.0)
    verdicts = {row.name: row.verdict for row in entry.rows}
    assert set(KERNELS) <= verdicts.keys() and entry.done
    assert LEFT_OUT not in verdicts.values(), [row for row in entry.rows if row.why]
    slow = {"rms_norm", "layer_norm", "swiglu", "rotary", "linear_cross_entropy"}
    assert {verdicts[name] for name in slow} == {"slower"}
    # No more than that: other candidates are ties here, and the clock is that of a busy machine.
    assert not slow & set(entry.choice.kernels) and cache.read(a_key()).choice == entry.choice


class Answers:
    """A launcher whose process finds nothing wrong."""

    def ask(self, question: dict[str, Any], limit: float) -> tuple[dict[str, Any], None]:
        return {"wrong": None}, None


def test_readings_of_a_part_are_compiled_once_and_weighed_by_the_step(monkeypatch):
    monkeypatch.setattr("nanovlm_fast.kernels.layer_norm.layer_norm", ops.layer_norm)
    made: list[tuple[str, Choice]] = []
    call = tuner.Parts.call

    def noted(self: Any, part: str, choice: Choice, **options: Any) -> Any:
        made.append((part, choice))
        return call(self, part, choice, **options)

    monkeypatch.setattr(tuner.Parts, "call", noted)
    bench = DeviceBench(job(), Answers(), 9)  # type: ignore[arg-type]  # only asked
    bench.time_plain(Choice())
    assert [part for part, _ in made] == ["vision", "language", "ends"]
    # 2 of 4 language blocks: the part is in the step twice.
    assert (bench.scale("vision"), bench.scale("language"), bench.scale("ends")) == (1, 2, 1)
    bench.plain = {"vision": 1.0, "language": 2.0, "ends": 5.0}
    assert bench.step_seconds() == 10.0
    assert bench.share("language", 0.5, 2.0) == pytest.approx(0.1)
    assert bench.share("blocks", 0.5, 2.0) == 0.25
    assert bench.share("update", 1.2, 2.0) == pytest.approx(0.1)
    bench.compare(Choice(), Choice(("layer_norm",)), "vision", 0.9)
    assert [part for part, _ in made] == ["vision", "language", "ends", "vision"]
    # A choice elsewhere changes nothing in the language blocks: the base is not built again.
    taken = Choice(("layer_norm",))
    compared = bench.compare(taken, taken, "language", 0.9)
    assert isinstance(compared, Comparison) and len(made) == 5


def test_the_seconds_of_the_whole_step_follow_from_plain_pytorchs(monkeypatch):
    bench = DeviceBench(job(), Answers(), 9)  # type: ignore[arg-type]  # not asked
    monkeypatch.setattr(tuner.time, "monotonic", itertools.count(step=10.0).__next__)
    monkeypatch.setattr(bench, "base_in", lambda part, choice: lambda: Reading(2.0))
    bench.time_plain(Choice())
    # Three parts of two blocks each, which take 10 s and are in the step 1, 2 and 1 times.
    assert bench.whole_seconds() == 2 * (30 * (6 / 4) ** 0.5 + 9 * (2 + 4 + 2))


def test_a_whole_step_that_does_not_fit_is_no_fault_of_the_choice(monkeypatch):
    bench = DeviceBench(job(), Answers(), 9)  # type: ignore[arg-type]  # not asked
    bench.bases["vision"] = (Choice(), lambda: Reading(1.0))

    def full(*_: object) -> Read:
        assert not bench.bases, "what else is compiled holds memory"
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "read_of", full)
    with pytest.raises(Unsettled, match="the memory does not hold both at once"):
        bench.compare(Choice(), Choice(("rms_norm",)), WHOLE, 0.9)
    with pytest.raises(Fails, match="OutOfMemoryError: CUDA out of memory"):
        bench.compare(Choice(), Choice(("rms_norm",)), "vision", 0.9)


def test_a_plain_model_that_does_not_run_in_its_process_is_no_candidates_fault(monkeypatch):
    monkeypatch.setattr(tuner, "SERVE", "raise SystemExit('all CUDA-capable devices are busy')")
    with pytest.raises(ValueError, match="plain PyTorch fails in a process of its own: ended"):
        tune(job(), a_key(), Choice(), seconds=10.0)
    assert cache.read(a_key()) is None


# A measurement in which every kernel is the faster, but for one that breaks the device while it is
# timed: all that follows in that process fails.
BREAKING = """
from nanovlm_fast.tune import tuner
from nanovlm_fast.tune.measure import Comparison
from tests.tune.test_tuner import FreeLauncher
lost = []
def compare_(base, candidate, level, pairs):
    if "rms_norm" in candidate or lost:
        lost.append(1)
        raise RuntimeError("CUDA error: an illegal memory access")
    return Comparison(1.0, 0.5, 0.5, 0.5, 0.5, 40)
def check(device):
    assert not lost, "lost"
tuner.Launcher = lambda *_: FreeLauncher()
tuner.compare = compare_
tuner.DeviceBench.base_in = lambda self, part, choice: choice.kernels
tuner.DeviceBench.read_of = lambda self, part, choice: choice.kernels
tuner.DeviceBench.time_plain = lambda self, plain: self.plain.update(vision=1, language=1, ends=1)
tuner.check_device = check
"""


def test_a_candidate_that_breaks_the_device_is_left_out_alone(monkeypatch, capsys):
    """And not those after it, which would fail in that process for no fault of theirs."""
    monkeypatch.setattr(tuner, "TUNE", BREAKING + tuner.TUNE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    entry = tune_apart(job(), a_key(), Choice(), seconds=100.0)
    assert entry.done and entry.left_out() == {"rms_norm": "the process that timed it died"}
    # The last rival of a group takes the others' place.
    assert set(entry.choice.kernels) >= {"rotary", "swiglu", "layer_norm", "embed_splice", "adamw"}
    said = capsys.readouterr().out
    assert "rms_norm is left out: the process that timed it ended with 1" in said
    assert said.rstrip().endswith("DeviceLost: RuntimeError: CUDA error: an illegal memory access")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise SystemExit('no device')", "the process that measured: ended with 1: no device"),
        ("from nanovlm_fast.tune import tuner; tuner.tune = None; tuner.serve()", "'NoneType'"),
    ],
)
def test_a_measurement_that_fails_in_its_process_is_an_error(code, why, monkeypatch):
    monkeypatch.setattr(tuner, "TUNE", code)
    with pytest.raises(ValueError, match=why):
        tune_apart(job(), a_key(), Choice(), seconds=10.0)


DIES_LAST = """
import os
from nanovlm_fast.tune import cache, tuner
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.search import TOGETHER, Found
def dies(job, key, plain, *rest):
    found = Found(Choice(kernels=("rms_norm",)), measuring=TOGETHER)
    cache.write(cache.Entry.of(key, plain, found, 1.0))
    os._exit(7)
tuner.tune = dies
tuner.serve()
"""


def test_a_process_that_dies_over_the_whole_step_leaves_plain_for_good(monkeypatch, capsys):
    """Or each run would measure for minutes again, and die again."""
    monkeypatch.setattr(tuner, "TUNE", DIES_LAST)
    entry = tune_apart(job(), a_key(), Choice(), seconds=10.0)
    assert entry.done and entry.choice == Choice()
    assert entry.rows[-1].part == WHOLE and entry.rows[-1].verdict == LEFT_OUT
    kept = cache.read(a_key())
    assert kept is not None and kept.to_json() == entry.to_json()
    assert "the whole step ended with 7" in capsys.readouterr().out


def test_ctrl_c_in_a_run_is_no_candidates_death_either(monkeypatch):
    found = Found(Choice(), measuring="rotary")
    cache.write(Entry.of(a_key(), Choice(), found, 1.0))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner.Launcher, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_apart(job(), a_key(), Choice(), seconds=10.0)
    assert cache.read(a_key()).left_out() == {}


def test_several_processes_are_not_offered_cuda_graphs(monkeypatch):
    offered: list[frozenset[str]] = []

    def noted(free: frozenset[str], *_: Any) -> list[Any]:
        offered.append(free)
        return []

    monkeypatch.setattr(tuner, "Launcher", lambda *_: FreeLauncher())
    monkeypatch.setattr(tuner, "gpu_candidates", noted)
    for several in (False, True):
        tune(job(), {**a_key(), "several_processes": several}, Choice(), seconds=10.0)
    assert [("compile" in free) for free in offered] == [True, False]


def test_sharded_weights_are_not_offered_the_update_that_they_cannot_have(monkeypatch):
    monkeypatch.setattr(tuner, "Launcher", lambda *_: FreeLauncher())
    monkeypatch.setattr(DeviceBench, "compare", planted({}))
    key = {**a_key(), "several_processes": True}
    for sharded in (False, True):
        entry = tune(job(), {**key, "sharded": sharded}, Choice(), seconds=50.0)
        names = {row.name for row in entry.rows}
        assert ("adamw" in names) is not sharded and "swiglu" in names


def test_an_unwritable_cache_is_one_warning_and_measuring_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "folder"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuner, "Launcher", lambda *_: FreeLauncher())
    monkeypatch.setattr(DeviceBench, "compare", planted({"swiglu": 0.5}))
    said: list[str] = []
    entry = tune(job(), a_key(), Choice(), seconds=50.0, say=said.append)
    assert entry.choice.kernels == ("swiglu",)
    assert len(said) == 1 and said[0].startswith("warning: what was measured is not kept: ")


class FreeLauncher(Answers):
    def __enter__(self) -> FreeLauncher:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def planted(ratios: dict[str, float]) -> Any:
    """`DeviceBench.compare` with planted ratios."""

    def compare(
        self: DeviceBench, base: Choice, choice: Choice, part: str, level: float
    ) -> Comparison:
        new = set(choice.kernels) - set(base.kernels)
        ratio = next((ratios[name] for name in new if name in ratios), 1.0)
        return Comparison(1.0, ratio, ratio, ratio, ratio, 40)

    return compare


def test_ctrl_c_is_no_candidates_death(monkeypatch):
    counter = itertools.count()

    def interrupted(*_: object) -> Comparison:
        if next(counter) < 2:
            return Comparison(1.0, 0.9, 0.9, 0.9, 0.9, 40)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "Launcher", lambda *_: FreeLauncher())
    monkeypatch.setattr(DeviceBench, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(job(), a_key(), Choice(), seconds=50.0)
    kept = cache.read(a_key())
    assert not kept.done and kept.left_out() == {} and len(kept.rows) == 2
    assert [row.verdict for row in kept.rows] == [TAKEN, TAKEN]
