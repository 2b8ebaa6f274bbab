"""bench/gpu_all.sh, rehearsed on a CPU at toy sizes: stages in order, results kept, nothing done twice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def gpu_all(*options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = ["bash", "bench/gpu_all.sh", "--quick", "--device", "cpu", *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_every_stage_leaves_its_result_and_is_not_done_twice(tmp_path):
    stages = "--stages roofline,attention,train_step,memory,generate,sanitize"
    first = gpu_all("--out", str(tmp_path), *stages.split())
    assert first.returncode == 0, first.stdout + first.stderr
    files = {file.stem for file in tmp_path.glob("*/*.json")}
    assert {"roofline", "attention", "train_step", "memory", "generate"} <= files
    assert {file.stem for file in (tmp_path / "logs").glob("*.log")} == {file for file in files} | {"sanitize"}
    again = gpu_all("--out", str(tmp_path), *stages.split())
    assert again.returncode == 0 and again.stdout.count("done before") == 6


def test_a_stage_that_fails_is_named_and_the_others_run(tmp_path):
    result = gpu_all("--out", str(tmp_path), "--stages", "roofline,sanitize", "--device", "gpu0")
    assert result.returncode == 1 and "failed: roofline" in result.stderr and "sanitize" in result.stdout
    assert not (tmp_path / "logs" / "roofline.done").exists() and (tmp_path / "logs" / "sanitize.done").exists()


@pytest.mark.parametrize("options", [["--stages", "kernel"], ["--stage", "tests"], ["--out"]])
def test_wrong_arguments_start_nothing(tmp_path, options):
    result = gpu_all(*options) if options == ["--out"] else gpu_all("--out", str(tmp_path), *options)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and not result.stdout
