"""bench.harness.kernel_sets without a GPU: who gets a time, and when it stops.

The processes are real. Each answers as its set would, and the steps of some are never done.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.harness import kernel_sets
from bench.harness.kernel_sets import Subject, Wanted
from bench.subjects.operators import ALL
from nanovlm_fast.command import ran_out_of_memory
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.training.warmup import full_batch
from nanovlm_fast.tune.candidates import Choice

CPU = torch.device("cpu")

PYTHON = """#!/bin/bash
name=$4
case $name in
    truth) exit 0 ;;
    hangs) exec sleep 600 ;;
    dies) echo "RuntimeError: no kernel image" >&2; exit 1 ;;
    slow*) echo "$name begins" >> log; sleep 0.3; echo "$name ends" >> log
        echo '{"loss": 0.01, "gradient": 0.1, "peak_mib": 1}' ;;
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


def test_few_sets_are_compiled_at_once_and_all_take_their_turns(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("log", str(tmp_path / "log")))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(kernel_sets, "AT_ONCE", 2)
    sets = ["none", "hangs", "slow1", "dies", "slow2", "slow3"]
    args = kernel_sets.make_parser().parse_args(["--sets", ";".join(sets), "--rounds", "1"])
    args.seconds = 6.0
    rows = list(kernel_sets.measure(args, tmp_path))[-1]
    # The one that hangs holds a place to the end, so these had one for all of them.
    alone = [f"slow{n} {what}" for n in (1, 2, 3) for what in ("begins", "ends")]
    assert (tmp_path / "log").read_text().splitlines() == alone
    assert [name for name in sets if "median" in rows[name]] == ["none", "slow1", "slow2", "slow3"]
    monkeypatch.setattr(kernel_sets, "AT_ONCE", 1)
    args.sets = "hangs;none"
    args.seconds = 1.5
    rows = next(kernel_sets.measure(args, tmp_path))
    assert rows["none"] == {"error": "no time left to compile it"}


def test_without_plain_pytorch_nothing_is_timed_and_the_reason_is_said(tmp_path, monkeypatch):
    rows: dict = {"none": {"error": "out of memory"}, "good": {"gradient": 0.1}}
    kernel_sets.judge(rows)
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
    monkeypatch.setattr(kernel_sets, "judge", lambda *_: time.sleep(args.seconds))
    (rows,) = kernel_sets.measure(args, Path(tmp_path))
    assert "gradient" in rows["none"] and "median" not in rows["none"]


def test_the_sets_are_of_kernels_that_there_are():
    wanted = [Wanted.read(name) for name in kernel_sets.SETS]
    names = {name for one in wanted for name in one.kernels.split(",")}
    assert names <= {kernel.name for kernel in ALL} | {"none", "all"}
    assert len({*wanted}) == len(kernel_sets.SETS) <= 8 and kernel_sets.SETS[0] == "none"


def test_a_set_names_options_that_the_tuner_chooses():
    name = "rms_norm, adamw,vision_attention=cudnn,bfloat16,attention=torch"
    both = "inductor=combo_kernels,inductor=dependent_launch"
    assert Wanted.read(f"{name},{both}") == Wanted(
        "rms_norm,adamw", "bfloat16", "torch", "cudnn", "combo_kernels,dependent_launch"
    )
    assert Wanted.read("none") == Wanted("none")
    assert {field.name for field in dataclasses.fields(Wanted)} - {"stream"} < {
        field.name for field in dataclasses.fields(Choice)
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "rms_norm,vision=cudnn",
            "vision=cudnn is none of stream=float32|bfloat16; att",
        ),
        ("rms_norm,attention=cudnn", "attention=cudnn is none of"),
        ("rms_norm,inductor=fast", "inductor=fast is none of"),
        ("no_such_kernel", "its kernels are none, all, or some of rms_norm"),
        ("none,rms_norm", "its kernels are none, all"),
        ("", "its kernels are none, all"),
        ("bfloat16", "its kernels are none, all"),
    ],
)
def test_what_a_set_may_not_name_is_one_line_that_names_it(name, said):
    with pytest.raises(ValueError, match=f"^--sets {re.escape(name)}: .*{re.escape(said)}"):
        Wanted.read(name)


def test_a_set_computes_by_its_options(tmp_path):
    """In this process, uncompiled, on the batch that the parent has written."""
    packed = full_batch(Budget(32, 4, 2, 12, 16), preset("tiny")[0])
    torch.save(vars(packed), tmp_path / "batch")
    batch = PackedBatch(**torch.load(tmp_path / "batch", weights_only=True))
    truth = Subject("none", "tiny", CPU, "none", batch).truth()
    a_set = "rms_norm,attention=sdpa,inductor=combo_kernels"
    subject = Subject(a_set, "tiny", CPU, "none", batch)
    assert subject.model.ops.kernels == ("rms_norm",) and subject.model.ops.backend == "sdpa"
    assert subject.errors(truth)["gradient"] < 1e-5
    assert len(subject.seconds(2)) == 2
    with torch.no_grad():
        subject.model.decoder.norm.weight.mul_(1.1)
    assert subject.errors(truth)["gradient"] > 1e-2


def test_what_says_that_memory_is_short_is_tried_again():
    """Others compile beside it. What fails for another reason would fail again."""
    words = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    assert ran_out_of_memory(RuntimeError(words))
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not ran_out_of_memory(RuntimeError("out of resource: shared memory"))


def test_a_set_waits_for_memory_with_its_model_too(tmp_path, monkeypatch, capsys):
    """One that begins later does so beside others, whose steps may fill the device."""
    packed = full_batch(Budget(32, 4, 2, 12, 16), preset("tiny")[0])
    torch.save(vars(packed), tmp_path / "batch")
    truth = Subject("none", "tiny", CPU, "none", packed).truth()
    torch.save(truth, tmp_path / "truth")
    failing = [torch.OutOfMemoryError("CUDA out of memory"), None]
    monkeypatch.setattr(kernel_sets.time, "sleep", lambda seconds: None)

    def subject(*arguments):
        if error := failing.pop(0):
            raise error
        return Subject(*arguments)

    monkeypatch.setattr(kernel_sets, "Subject", subject)
    monkeypatch.setattr(sys, "stdin", [])
    options = ["--serve", "none", "--preset", "tiny", "--device", "cpu", "--compile", "none"]
    files = ["--truth", str(tmp_path / "truth"), "--batch", str(tmp_path / "batch")]
    assert kernel_sets.main([*options, *files]) == 0
    assert not failing and '"gradient"' in capsys.readouterr().out


def test_a_first_step_without_room_leaves_nothing_to_the_next(tmp_path, monkeypatch, capsys):
    """Gradients would be added to those of the step before, and half a state is no state."""
    packed = full_batch(Budget(32, 4, 2, 12, 16), preset("tiny")[0])
    torch.save(vars(packed), tmp_path / "batch")
    torch.save(Subject("none", "tiny", CPU, "none", packed).truth(), tmp_path / "truth")
    monkeypatch.setattr(kernel_sets.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "stdin", [])
    zeros_like = torch.zeros_like
    failing = [torch.OutOfMemoryError("CUDA out of memory")]

    def in_adamw(*arguments, **more):
        if failing:
            raise failing.pop()
        return zeros_like(*arguments, **more)

    monkeypatch.setattr(torch, "zeros_like", in_adamw)
    options = ["--serve", "none", "--preset", "tiny", "--device", "cpu"]
    files = ["--truth", str(tmp_path / "truth"), "--batch", str(tmp_path / "batch")]
    assert kernel_sets.main([*options, *files, "--compile", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not failing and found["gradient"] < 0.01


def test_a_cpu_is_refused(capsys):
    with pytest.raises(ValueError, match="kernels run on a GPU"):
        kernel_sets.main.__wrapped__(["--device", "cpu"])
