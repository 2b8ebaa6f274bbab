"""`python -m bench`: suites do not affect each other, and their results are kept.

An error is reported in one line.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as runner
from bench import roofline
from bench import suites as suites_module
from bench.harness import results
from bench.pages import sections
from bench.subjects.step_time import H100
from bench.suites import SUITES, Suite
from tests.support.processes import ROOT, run_python

WRITES = """
import json, pathlib, sys
file = pathlib.Path(sys.argv[sys.argv.index('--out') + 1], 'cpu', '%s.json')
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps({'speedup': 2.0}))
print('a table')
"""


@pytest.fixture
def suites(tmp_path, monkeypatch):
    """Replaces the table by suites that are small programs; returns `python -m bench` over them."""
    folder = tmp_path / "programs"
    folder.mkdir()

    def call(*options: str, **programs: str) -> int:
        monkeypatch.setattr(
            suites_module,
            "SUITES",
            tuple(Suite(name, f"about {name}", seconds=1) for name in programs),
        )
        for name, program in programs.items():
            (folder / f"{name}.py").write_text(program)
        monkeypatch.setattr(
            runner, "command", lambda suite, quick, device, out: [
                sys.executable, str(folder / f"{suite.name}.py"), "--out", str(out)]
        )  # fmt: skip
        monkeypatch.setattr(runner, "misfit", lambda suite, *_: None)
        return runner.main(["--device", "cpu", "--out", str(tmp_path / "out"), *options])

    return call


def test_a_suite_that_dies_harms_no_other(suites, tmp_path, capsys):
    killed = (
        "import os, signal, time\nprint('begun', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    raises = "raise RuntimeError('CUDA error: the device is gone')"
    assert suites(first=WRITES % "first", killed=killed, raises=raises, last=WRITES % "last") == 1
    printed = capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").glob("*/*.json")} == {
        "first.json",
        "last.json",
    }
    summary = printed[printed.rindex("suite ") :]
    assert summary.count("ran; 2.0x") == 2 and "failed: exit code -9" in summary
    assert (
        "failed: RuntimeError: CUDA error: the device is gone" in summary and "last.json" in summary
    )
    assert printed.count("a table") == 2 and "begun" in printed


def test_a_suite_past_its_limit_is_stopped_with_all_it_started(
    suites, tmp_path, capsys, monkeypatch
):
    child = f"import pathlib, time\ntime.sleep(6)\npathlib.Path({str(tmp_path / 'late')!r}).touch()"
    hangs = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(suites_module, "SHORTEST_LIMIT", 3.0)
    monkeypatch.setattr(suites_module, "LIMIT_FACTOR", 1.0)
    assert suites(hangs=hangs, last=WRITES % "last") == 1
    printed = capsys.readouterr().out
    assert "stopped after 3 s, its limit" in printed and "ran; 2.0x" in printed
    time.sleep(4)  # the child would have finished by now
    assert not (tmp_path / "late").exists()


def test_nothing_runs_past_the_whole_time(suites, capsys, monkeypatch):
    monkeypatch.setattr(runner, "TOTAL", 4.0)
    assert suites(late=WRITES % "late") == 1 and "minutes are over" in capsys.readouterr().out


def test_only_and_wrong_arguments(suites, tmp_path, capsys):
    assert suites("--only", "b", a=WRITES % "a", b=WRITES % "b") == 0
    assert [file.name for file in (tmp_path / "out").glob("*/*.json")] == ["b.json"]
    for options in (["--only", "nonsense"], ["--device", "gpu7"], ["--device", "cuda:99"]):
        assert runner.main([*options, "--out", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: --") and options[1] in error and error.count("\n") == 1


def test_a_result_of_another_schema_is_left_alone(suites, tmp_path, capsys):
    file = results.place("a", torch.device("cpu"), tmp_path / "out")
    file.parent.mkdir(parents=True)
    file.write_text(text := json.dumps({"schema": results.SCHEMA + 1}))
    assert suites(a=WRITES % "a") == 1
    error = capsys.readouterr().err
    assert (
        "of schema 2, this version knows 1" in error
        and str(file) in error
        and error.count("\n") == 1
    )
    with pytest.raises(ValueError, match="schema 2"):
        results.write("a", torch.device("cpu"), {}, tmp_path / "out")
    assert file.read_text() == text


FULL_DISK = """
import resource, sys
from bench import roofline
from bench.subjects.step_time import H100
roofline.measured_rates = lambda device: H100
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.exit(
    roofline.main(["--preset", "tiny", "--samples", "1", "--device", "cpu", "--out", sys.argv[1]])
)
"""


def test_a_full_disk_leaves_the_earlier_result(tmp_path, monkeypatch):
    """A real limit on the size of files makes the write fail half-way."""
    monkeypatch.setattr(roofline, "measured_rates", lambda device: H100)
    assert (
        roofline.main(
            ["--preset", "tiny", "--samples", "1", "--device", "cpu", "--out", str(tmp_path)]
        )
        == 0
    )
    (file,) = tmp_path.glob("*/*.json")
    before = file.read_text()
    # the same device name, which has the number of threads in it
    done = run_python("-c", FULL_DISK, str(tmp_path), OMP_NUM_THREADS=str(torch.get_num_threads()))
    assert done.returncode == 1 and file.read_text() == before and len(before) > 600
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("error: ")
        and "untouched" in last
        and str(file) in last
        and "Traceback" not in done.stderr
    )
    assert list(tmp_path.rglob("*")) == [file.parent, file]  # and nothing is half-written


def test_an_interrupt_stops_the_suite_and_keeps_the_results(tmp_path):
    """Ctrl-C on the real command, once its first suite has begun."""
    command = [
        sys.executable,
        "-m",
        "bench",
        "--quick",
        "--only",
        "attention,generate",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},  # otherwise its lines come when all is over
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("== generate"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and "the results above stay" in errors
        and "attention.json" in printed
    )
    assert [file.name for file in tmp_path.glob("*/*.json")] == ["attention.json"]


def test_the_table_of_suites_is_true():
    assert len({suite.name for suite in SUITES}) == len(SUITES)
    pages = {suite.name for suite in SUITES if suite.section}
    assert pages >= sections.ROWS.keys(), "a table for a section that does not exist"
    for suite in SUITES:
        assert suite.about.endswith(".") and suite.about.count(". ") == 0, "one sentence"
        script = suite.stage.script[:1] if suite.stage else ()
        files = script or (f"{suite.module.replace('.', '/')}.py",)
        assert (ROOT / files[0]).is_file()
    by_hand = [suite.name for suite in SUITES if suite.by_hand]
    with pytest.raises(ValueError, match=f"--only {by_hand[0]}: there are facts, "):
        runner.chosen(by_hand[0])
    for on_gpu in (False, True):
        together = [suite for suite in runner.chosen("") if not runner.misfit(suite, False, on_gpu)]
        assert sum(suite.seconds for suite in together) <= runner.TOTAL
    assert sum(suite.quick_seconds for suite in runner.chosen("") if suite.in_quick) <= 90
    for suite in runner.chosen("race,facts,profile"):
        assert suite.alone and suite not in runner.chosen("") and suite.seconds <= runner.TOTAL
    kernels = next(suite for suite in SUITES if suite.name == "kernels")
    assert runner.misfit(kernels, False, on_gpu=False) == "needs a GPU"
    assert runner.misfit(kernels, True, on_gpu=False) is None
    assert runner.misfit(Suite("no_such_suite", ""), False, True).startswith("not here")
    package = Suite("roofline", "", needs=("no_such_package",))
    assert runner.misfit(package, False, True) == "needs the package no_such_package"
    full = runner.command(kernels, False, "cuda", Path("out"))
    assert full[1:] == ["-m", "bench.kernels", "--device", "cuda", "--out", "out"]


def test_what_warns_in_a_result_is_in_the_summary(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps({"small": True, "machine": {"warnings": ["the GPU slowed down: thermal"]}})
    )
    assert list(runner.notes(file)) == ["rehearsed, not timed", "the GPU slowed down: thermal"]
    file.write_text(json.dumps({"speedup": {"2 workers": 3.0}}))
    assert list(runner.notes(file)) == []
    file.write_text("{")
    assert "not JSON" in next(runner.notes(file))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_bench_runs_suites_and_sums_them_up(tmp_path):
    """Suites that no stage of bench/gpu_all.sh runs, and one that does.

    The rehearsal of the stages (test_gpu_all.py) runs the others. The test checks what its own
    processes compute, not what other processes do at the same time.
    """
    here = [
        suite for suite in runner.chosen("") if runner.misfit(suite, True, on_gpu=False) is None
    ]
    names = [suite.name for suite in here if suite.stage is None or suite.name == "attention"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call = ["-m", "bench", "--quick", "--device", "cpu", "--only", ",".join(names)]
    done = subprocess.run(
        [sys.executable, *call, "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout[done.stdout.rindex("suite  ") :]
    assert summary.count(" ran") == len(names) >= 3 and "failed" not in summary
    assert {f"{name}.json" for name in names} == {file.name for file in tmp_path.glob("*/*.json")}
    assert used.ru_utime - before.ru_utime < 60  # seconds of one core
