"""bench/gpu_all.sh, rehearsed on a CPU at toy sizes.

The stages run in order, their results are kept, and nothing is done twice.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

SCRIPT = ROOT / "bench" / "gpu_all.sh"
STAGES = re.search(r"^all=(\S+)", SCRIPT.read_text(), re.MULTILINE).group(1).split(",")


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
    wanted = "facts tests kernels attention train_step memory generate profile".split()
    assert STAGES[: len(wanted)] == wanted and STAGES[-1] == "race"


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_stage_leaves_its_result_and_is_not_done_twice(tmp_path):
    first = gpu_all(
        "--out", str(tmp_path), "--seconds", "880"
    )  # some two minutes, on a machine that has them
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.findall(r"^== (\w+): ", first.stdout, re.MULTILINE) == STAGES
    files = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*/*.json")}
    assert set(files) == set(STAGES) - {"sanitize"}, "each its own JSON"
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
    *--only\\ kernels*) echo "the device is gone"; exit 1 ;;
    *bench.race*) echo "half-way"; exit 75 ;;
    *xdist*) exit 1 ;;
    *) echo "fine" ;;
esac
"""


def test_a_stage_that_fails_is_named_and_the_others_run(tmp_path):
    """With a python that knows what to answer: whether a stage fails is not what this is about."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
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


@pytest.mark.parametrize("options", [["--stages", "kernel"], ["--stage", "tests"], ["--out"]])
def test_wrong_arguments_start_nothing(tmp_path, options):
    result = (
        gpu_all(*options) if options == ["--out"] else gpu_all("--out", str(tmp_path), *options)
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ") and not result.stdout
