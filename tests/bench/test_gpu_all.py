"""bench/gpu_all.sh, rehearsed on a CPU at toy sizes.

The stages run in order, their results are kept, and nothing is done twice.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from bench import suites, train_step
from bench.harness import commit as commits
from bench.harness import stages
from bench.harness.commit import VARIABLE
from bench.harness.stages import allowance, command
from bench.subjects.operators import ALL, KERNELS
from bench.subjects.small_launches import LARGER
from bench.subjects.variants import budget_of
from bench.subjects.workload import load_work
from nanovlm_fast.data.budget import LABEL_MULTIPLE
from nanovlm_fast.presets import preset
from tests.support.processes import ROOT

SCRIPT = ROOT / "bench" / "gpu_all.sh"
STAGES = list(suites.STAGES)
CALL = 570.0  # seconds of one call


def gpu_all(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        **env,
    }
    command = ["bash", str(SCRIPT), "--quick", "--device", "cpu", *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def test_the_stages_come_in_the_order_of_their_worth():
    wanted = "facts train_step profile tests kernels attention memory generate".split()
    assert STAGES[: len(wanted)] == wanted and STAGES[-1] == "race"


# ---- the time of each


def test_no_stage_takes_what_the_next_ones_need(monkeypatch):
    """The first gets all that is left but for the least times of the others."""
    monkeypatch.setattr(stages, "GRACE", 5.0)
    assert allowance(400, [20, 100, 50], 570) == 400, "never more than its limit"
    assert allowance(400, [20, 100, 50], 300) == 300 - 105 - 55
    assert allowance(400, [20, 100, 50], 70) == 70, "neither 105 nor 55 more fit"
    assert allowance(400, [20, 100, 50], 80) == 25, "the third fits where the second does not"
    assert allowance(400, [20, 100, 50], 19) == 0
    assert allowance(math.inf, [20], 123) == 123
    assert allowance(400, [60], 60) == 60, "its own least time is enough to start"


def test_what_fits_into_a_call_gets_its_least_time_however_long_the_others_take():
    """All stages take all that they are given; what they leave starts nothing too late."""
    left = CALL
    waiting = [(name, suites.STAGES[name].stage.least) for name in STAGES]
    ran = {}
    while waiting:
        name, least = waiting[0]
        limit = suites.STAGES[name].stage_limit()
        seconds = allowance(limit, [least for _, least in waiting], left)
        if seconds:
            assert seconds >= least
            ran[name] = seconds
            left -= seconds + stages.GRACE  # all of it, and as long to end as it may
        waiting = waiting[1:]
    assert left >= -stages.GRACE and list(ran)[:4] == ["facts", "train_step", "profile", "tests"]
    assert ran["train_step"] > 200


def test_a_stage_that_compiles_is_not_started_at_the_last_moment():
    compiling = "train_step profile tests kernels attention memory generate sanitize race".split()
    compiling += ["train_step_ablation"]
    assert all(suites.STAGES[name].stage.least >= 60 for name in compiling)
    for suite in suites.STAGES.values():
        assert suite.stage.least <= min(suite.stage_limit(), CALL)
    for step in (suites.STAGES["train_step"], suites.STAGES["train_step_ablation"]):
        budget = float(step.gpu[step.gpu.index("--budget-s") + 1])
        assert step.stage.least >= budget + 60, "it compiles for a minute when its budget is spent"


def test_the_first_step_compiles_ours_alone_and_the_ablation_does_not_replace_its_file():
    first, ablation = (
        train_step.parse([*suites.STAGES[name].gpu, "--device", "cpu"])
        for name in ("train_step", "train_step_ablation")
    )
    assert first.variants == ("ours",) and ablation.variants == ("all",)
    assert train_step.result_name(first) == "train_step_nanovlm-222m"
    assert train_step.result_name(ablation) == "train_step_nanovlm-222m_ablation"
    assert STAGES.index("train_step_ablation") > STAGES.index("kernels")


def test_a_step_on_a_gpu_has_the_recipes_size():
    """So that what the profile measures can be laid beside the prediction, kernel by kernel."""
    steps = [suites.STAGES[name].gpu for name in ("train_step", "train_step_ablation", "profile")]
    assert {step[: len(suites.GPU_STEP)] for step in steps} == {suites.GPU_STEP}
    name, samples = suites.GPU_STEP[1], int(suites.GPU_STEP[3])
    budget = budget_of(load_work(name, samples=samples).samples, LABEL_MULTIPLE["cuda"])
    assert budget.tokens == preset(name)[1].tokens_per_batch
    (file,) = (ROOT / "bench" / "results").glob("*/compiled_step.json")
    predicted = json.loads(file.read_text())["budget"]
    for size in ("tokens", "images", "labels"):
        assert getattr(budget, size) == predicted[size]


def test_stages_that_stop_themselves_are_told_when():
    tests = command(suites.STAGES["tests"], False, "cuda", "out", 200.0)
    assert tests[1:] == (
        "-m bench.checks --processes 6 --limit 170 --device cuda --out out".split()
    )
    race = command(suites.STAGES["race"], False, "cuda", "out", 300.0)
    assert "--wall-s 270 " in " ".join(race)
    runner = command(suites.STAGES["kernels"], True, "cpu", "out", 300.0)
    assert runner[1:] == "-m bench --only kernels --quick --device cpu --out out".split()


SLOW = r"""#!/usr/bin/env bash
case "$*" in
    *bench.harness.stages*) exec {python} "$@" ;;
    *--only\ facts*) sleep 60 & echo begun; wait ;;
    *) echo "fine" ;;
esac
"""


def test_a_stage_that_takes_too_long_leaves_the_others_their_time(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text(SLOW)
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setattr(stages, "QUICK_LEAST", 2.0)
    monkeypatch.setattr(stages, "GRACE", 1.0)
    wanted = ["--quick", "--seconds", "5.4", "--stages", "facts,roofline"]
    wanted += ["--device", "cpu", "--out", str(tmp_path)]
    assert stages.main(wanted) == 1
    printed, errors = capsys.readouterr()
    assert errors == "not finished, the next call continues: facts\n"
    assert "stopped to leave time for others, 2 s: begun" in printed
    assert (tmp_path / "logs" / "roofline.done").exists()
    assert not (tmp_path / "logs" / "facts.done").exists()


def test_an_interrupt_ends_the_stage_with_what_it_started(tmp_path):
    python = tmp_path / "python"
    python.write_text(SLOW.replace("{python}", sys.executable).replace("sleep 60", "exec sleep 61"))
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python)}
    call = ["bash", str(SCRIPT), "--quick", "--stages", "facts", "--device", "cpu"]
    call += ["--out", str(tmp_path)]
    process = subprocess.Popen(call, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "facts.log"
    while not (log.exists() and log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=stages.GRACE + 10)[1]
    assert process.returncode == 130 and errors == "error: interrupted\n"
    assert not subprocess.run(["pgrep", "-f", "^sleep 61$"], capture_output=True).stdout


# ---- what was done before


def test_what_was_done_on_something_else_is_not_done(tmp_path, monkeypatch, capsys):
    """A rehearsal, another device and another commit leave a call all its work."""
    monkeypatch.setenv("PYTHON", shutil.which("true"))

    def runs(*options: str) -> bool:
        assert stages.main(["--stages", "facts", "--out", str(tmp_path), *options]) == 0
        return "== facts: done before\n" not in capsys.readouterr().out

    monkeypatch.setenv(VARIABLE, "a" * 40)
    assert runs("--device", "cpu", "--quick") and not runs("--device", "cpu", "--quick")
    assert runs("--device", "cpu") and not runs("--device", "cpu")
    assert runs("--device", "cuda") and not runs("--device", "cuda")
    monkeypatch.setenv(VARIABLE, "b" * 40)
    assert runs("--device", "cuda") and not runs("--device", "cuda")
    assert runs("--device", "cuda", "--again")


def test_a_rehearsal_is_kept_apart_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", shutil.which("true"))
    monkeypatch.setattr(stages, "HERE", tmp_path)
    options = ["--stages", "facts", "--device", "cpu"]
    assert stages.main([*options, "--quick"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert stages.main(options) == 0
    assert (tmp_path / "bench" / "results" / "logs" / "facts.done").exists()


def test_no_stage_starts_on_a_gpu_without_a_commit(tmp_path, monkeypatch, capsys):
    """As in a copy of the tree without its history; here git itself is missing."""
    monkeypatch.setenv("PYTHON", shutil.which("true"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(commits, "LOADED", commits.git("rev-parse", "HEAD"))
    monkeypatch.delenv(VARIABLE, raising=False)
    options = ["--stages", "facts", "--out", str(tmp_path / "out")]
    for device in ("cuda", "cuda:1", "auto"):
        assert stages.main([*options, "--device", device]) == 1
        printed, error = capsys.readouterr()
        assert f"set {VARIABLE} to its commit" in error and error.count("\n") == 1 and not printed
    assert not (tmp_path / "out").exists()
    assert stages.main([*options, "--device", "cpu"]) == 0
    monkeypatch.setenv(VARIABLE, "a" * 40)
    assert stages.main([*options, "--device", "cuda"]) == 0


# ---- whole calls


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_stage_leaves_its_result_and_is_not_done_twice(tmp_path):
    first = gpu_all(
        "--out", str(tmp_path), "--seconds", "880"
    )  # about two minutes on a machine with idle cores
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.findall(r"^== (\w+): ", first.stdout, re.MULTILINE) == STAGES
    files = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*/*.json")}
    # Each its own JSON; the tuner's is named for the preset that it is about.
    assert set(files) == {*STAGES, "tune_tiny"} - {"sanitize", "tune"}
    assert all(
        {"device", "commit", "command", "torch"} <= result.keys() for result in files.values()
    )
    assert {file.stem for file in (tmp_path / "logs").glob("*.log")} == set(STAGES)
    assert (
        files["facts"]["copy_bytes_per_s"] > 0
        and files["profile"]["by_kind"]
        and files["tests"]["failed"] == 0
    )
    again = gpu_all("--out", str(tmp_path))
    assert again.returncode == 0 and again.stdout.count("done before") == len(STAGES)


PYTHON = """#!/usr/bin/env bash
case "$*" in
    *bench.harness.stages*) exec {python} "$@" ;;
    *--only\\ kernels*) echo "the device is gone"; exit 1 ;;
    *bench.race*) echo "half-way"; exit 75 ;;
    *) echo "fine" ;;
esac
"""


def test_a_stage_that_fails_is_named_and_the_others_run(tmp_path):
    """A stand-in for python answers what it is told to.

    Whether a stage fails for the right reason is not tested here.
    """
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("{python}", sys.executable))
    python.chmod(0o755)
    result = gpu_all("--out", str(tmp_path), PYTHON=str(python))
    assert result.returncode == 1 and "failed: kernels\n" in result.stderr
    assert (
        "the next call continues: race\n" in result.stderr and "the device is gone" in result.stdout
    )
    done = {file.stem for file in (tmp_path / "logs").glob("*.done")}
    assert done == set(STAGES) - {"kernels", "race"}
    again = gpu_all("--out", str(tmp_path), PYTHON=str(python))
    assert again.stdout.count("done before") == len(STAGES) - 2 and "== kernels: " in again.stdout


def test_what_finds_no_time_is_left_for_the_next_call(tmp_path):
    result = gpu_all("--out", str(tmp_path), "--seconds", "5", "--stages", "roofline,race")
    assert result.returncode == 1 and "the next call continues: roofline race" in result.stderr
    assert not list((tmp_path / "logs").iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--stages", "kernel"],
        ["--stage", "tests"],
        ["--device", "no/such file"],
        ["--device", "cuda:x"],
        ["--device", ""],
        ["--out"],
    ],
)
def test_wrong_arguments_start_nothing(tmp_path, options):
    result = (
        gpu_all(*options) if options == ["--out"] else gpu_all("--out", str(tmp_path), *options)
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ") and not result.stdout


def test_the_sanitizer_sees_loops_that_go_round():
    """Kernels whose programs loop have sizes of their own; the others do not loop."""
    straight = {"rotary", "swiglu", "embed_splice"}
    assert {kernel.name for kernel in KERNELS} - straight == LARGER.keys()
    assert LARGER["document_attention"]["max_seqlen"] == 128
    assert 128 < LARGER["image_attention"]["patches"] < 256


SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*" | sed "s|{python}|python|"
shift 4
exec "${@/%cuda/cpu}"
"""


@pytest.mark.slow
def test_the_sanitizer_runs_every_kernel_under_every_tool(tmp_path):
    """With a compute-sanitizer that only starts the program, which is the real one, on a CPU."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.replace("{python}", sys.executable))
    tool.chmod(0o755)
    places = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": places, "PYTHON": sys.executable, "TRITON_INTERPRET": "0"}
    call = ["bash", str(ROOT / "bench" / "sanitize.sh"), "memcheck"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    program = "python -m bench.subjects.small_launches --device cuda"
    ran = [f"{kernel.name} ran" for kernel in ALL]
    first = ["== memcheck", f"sanitizer --tool memcheck --error-exitcode 1 {program}"]
    assert done.stdout.splitlines() == [*first, *ran]
