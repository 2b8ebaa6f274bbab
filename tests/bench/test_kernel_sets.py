"""bench.harness.kernel_sets without a GPU: who gets a time, and when it stops.

The processes are real. Each answers as its set would, and the steps of some are never done.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import pytest

from bench.harness import kernel_sets
from bench.subjects.operators import ALL

PYTHON = """#!/bin/bash
name=$4
case $name in
    truth) exit 0 ;;
    hangs) exec sleep 600 ;;
    dies) echo "RuntimeError: no kernel image" >&2; exit 1 ;;
    wrong) echo '{"loss": 0.1, "gradient": 0.3, "peak_mib": 1}' ;;
    nan) echo '{"loss": NaN, "gradient": NaN, "peak_mib": 1}' ;;
    gone) echo '{"loss": 0.01, "gradient": 0.1, "peak_mib": 1}'; echo killed >&2; exit 1 ;;
    *) echo '{"loss": 0.01, "gradient": 0.1, "peak_mib": 1}' ;;
esac
while read -r steps; do
    [ "$name" = stops ] && exec sleep 600
    [ "$name" = leaves ] && exit 1
    echo "[0.1, 0.3, 0.2]"
done
"""


def test_each_set_gets_a_time_or_the_reason_why_not(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(kernel_sets, "STEPS_LIMIT", 1.0)
    options = ["--sets", "none;good;wrong;nan;dies;hangs;stops;leaves;gone", "--rounds", "2"]
    args = kernel_sets.make_parser().parse_args([*options, "--seconds", "9"])
    written = [copy.deepcopy(rows) for rows in kernel_sets.measure(args, tmp_path)]
    assert len(written) == 3, "when all are compiled, and after each round"
    rows = written[-1]
    assert rows["good"]["seconds"] == rows["none"]["seconds"] == [0.1, 0.3, 0.2] * 2
    assert rows["good"]["median"] == 0.2
    assert "gradients off by 3.0e-01" in rows["wrong"]["error"] and "median" not in rows["wrong"]
    assert "gradients off by nan" in rows["nan"]["error"] and "median" not in rows["nan"]
    assert rows["gone"] == {"error": "killed"}, "it ended before it was asked"
    assert rows["dies"] == {"error": "RuntimeError: no kernel image"}
    assert rows["hangs"] == rows["stops"] == {"error": "no answer in time"}
    assert rows["leaves"] == {"error": "no reason given"}
    assert "error" not in written[0]["stops"], "it was ready"


def test_without_plain_pytorch_nothing_is_timed_and_the_reason_is_said(tmp_path, monkeypatch):
    rows: dict = {"none": {}, "good": {}}

    class Answers:
        def __init__(self, error: str):
            self.error = error

        def answer(self, deadline: float) -> dict:
            if self.error:
                raise RuntimeError(self.error)
            return {"gradient": 0.1}

    kernel_sets.compare({"none": Answers("out of memory"), "good": Answers("")}, rows, 0.0)
    assert rows["none"]["error"] == "out of memory"
    assert rows["good"]["error"] == "nothing to compare with: none failed"
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    args = kernel_sets.make_parser().parse_args(["--seconds", "1.5"])
    for line, said in (("exit 1", "no reason given"), ("exec sleep 600", "no answer in time")):
        python.write_text(f"#!/bin/bash\n{line}\n")
        python.chmod(0o755)
        with pytest.raises(RuntimeError, match=f"plain PyTorch in float32: {said}"):
            list(kernel_sets.measure(args, tmp_path))


def test_no_round_begins_when_the_time_is_spent(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    args = kernel_sets.make_parser().parse_args(["--sets", "none", "--seconds", "1"])
    monkeypatch.setattr(kernel_sets, "compare", lambda *_: time.sleep(args.seconds))
    assert list(kernel_sets.measure(args, Path(tmp_path))) == [{"none": {}}]


def test_the_sets_are_of_kernels_that_there_are():
    names = {name for one in kernel_sets.SETS for name in one.split(",")}
    assert names <= {kernel.name for kernel in ALL} | {"none", "all", "bfloat16"}


def test_a_cpu_is_refused(capsys):
    with pytest.raises(ValueError, match="kernels run on a GPU"):
        kernel_sets.main.__wrapped__(["--device", "cpu"])
