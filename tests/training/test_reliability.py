"""What happens to long runs.

The tests cover signals, dead and hung processes, and full disks.
Nothing is mocked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import reliability
from bench.reliability import SMALL, losses, ranks_of, resources
from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.reporting.metrics import read_metrics
from nanovlm_fast.training import checkpoint as checkpoints
from nanovlm_fast.training.checkpoint import Checkpointer
from nanovlm_fast.training.optim import make_optimizers
from nanovlm_fast.weights.folder import newest_checkpoint
from tests.support.processes import ROOT, run_python
from tests.support.runs import start
from tests.support.shared import shared_folder

SAVED, HUNG = 75, 70
STEPS = "120"  # enough that a signal comes before the end


def until(condition, process: subprocess.Popen, run: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"ended with {process.poll()}, or took too long: {log_of(run)[-3000:]}")
        time.sleep(0.005)


def end(process: subprocess.Popen, seconds: float = 200) -> int:
    try:
        return process.wait(seconds)
    finally:
        process.kill()


def log_of(run: Path) -> str:
    return run.with_suffix(".log").read_text()


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A run that nothing has disturbed."""

    def make(folder: Path) -> None:
        folder.mkdir()
        assert end(start(folder / "run", 1, [*SMALL, "--max-steps", STEPS])) == 0

    return shared_folder(tmp_path_factory, "plain", make) / "run"


# ---- signals and dead processes


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_run_saves_says_so_by_its_code_and_goes_on(tmp_path, plain, signum):
    """--auto-resume is the same command twice."""
    out = tmp_path / "run"
    for life in range(2):
        process = start(out, 1, [*SMALL, "--max-steps", STEPS, "--auto-resume"])
        if life == 0:
            until(lambda: len(losses(out)) >= 5, process, out)
            process.send_signal(signum)
            assert end(process) == SAVED
            assert 5 <= len(losses(out)) < int(STEPS)
            assert newest_checkpoint(out).name == f"step-{len(losses(out)):06d}"
    assert end(process) == 0
    assert losses(out) == losses(plain)


@pytest.mark.slow
def test_one_ranks_signal_stops_all_ranks_after_the_same_step(tmp_path):
    out, options = (
        tmp_path / "run",
        [*SMALL, "--max-steps", "400", "--save-every", "0", "--auto-resume"],
    )
    process = start(out, 2, options)
    until(lambda: len(losses(out)) >= 3, process, out)
    os.kill(ranks_of(process.pid)[1], signal.SIGUSR1)
    assert end(process) != 0  # torchrun's own code; it names the rank's
    step = int(newest_checkpoint(out).name[5:])
    assert f"interrupted at step {step}: saved" in log_of(out) and f"exitcode  : {SAVED}" in log_of(
        out
    )
    assert json.loads((out / "last" / "state.json").read_text())["step"] == step == len(losses(out))


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_worker_died(tmp_path):
    """With --max-restarts and --auto-resume the losses are those of an undisturbed run."""
    options = [*SMALL, "--max-steps", STEPS, "--auto-resume"]
    assert end(start(tmp_path / "plain", 2, options)) == 0
    out = tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = reliability.command(out, 2, options)
    command.insert(command.index("--standalone"), "--max-restarts=2")
    with out.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    until(lambda: len(losses(out)) >= 7, process, out)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    assert end(process) == 0, log_of(out)[-3000:]
    assert "resuming" in log_of(out)
    assert losses(out) == losses(tmp_path / "plain")


def loader_workers(pid: int) -> list[int]:
    """The children of a process that load its data, which are forks of it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in children:
        with contextlib.suppress(OSError):  # it is gone already
            if (
                Path(f"/proc/{child}/cmdline").read_bytes()
                == Path(f"/proc/{pid}/cmdline").read_bytes()
            ):
                found.append(int(child))
    return found


def test_a_loader_worker_that_dies_is_replaced_and_nothing_is_lost(tmp_path, plain):
    out = tmp_path / "run"
    process = start(out, 1, [*SMALL, "--max-steps", STEPS])
    for step in (3, 12):
        until(
            lambda step=step: len(losses(out)) >= step and loader_workers(process.pid), process, out
        )
        os.kill(loader_workers(process.pid)[0], signal.SIGKILL)
    assert end(process) == 0, log_of(out)[-3000:]
    assert "new workers go on from the same batch" in log_of(out)
    assert losses(out) == losses(plain)


def test_workers_that_die_again_and_again_end_the_run_with_one_line(tmp_path):
    out = tmp_path / "run"
    process = start(out, 1, [*SMALL, "--max-steps", "100000"])
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        for worker in loader_workers(process.pid) if losses(out) else []:
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.1)
    assert end(process) == 1
    assert "error: loader workers die again and again" in log_of(out) and "Traceback" not in log_of(
        out
    )


def test_a_hung_process_reports_its_stack_and_ends(tmp_path):
    """The worker of its loader is frozen, so the next batch never comes.

    A file system that does not answer has the same effect.
    """
    out = tmp_path / "run"
    process = start(out, 1, [*SMALL, "--max-steps", "100000", "--hang-timeout", "5"])
    until(lambda: len(losses(out)) >= 3 and loader_workers(process.pid), process, out)
    worker = loader_workers(process.pid)[0]
    os.kill(worker, signal.SIGSTOP)
    try:
        assert end(process) == HUNG, log_of(out)[-3000:]
    finally:
        if Path(f"/proc/{worker}").exists():
            os.kill(worker, signal.SIGKILL)
    for report in (log_of(out), (out / "hang-rank0.txt").read_text()):
        assert re.search(
            r"error: rank 0 hangs: waiting for the data of step \d+, for \d+ s\. It stands at",
            report,
        )
        assert "in next_batches" in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hangs", "options", "doing"),
    [
        (
            1,
            ["--save-every", "1"],
            "computing step|waiting for the other ranks",
        ),  # the wait is mostly for a save
        (
            0,
            "--data synthetic:1000 --val-samples 900 --eval-every 1".split(),
            "waiting for the first rank's evalua",
        ),
    ],
    ids=["save", "evaluation"],
)
def test_ranks_that_wait_for_a_hung_rank_end_too(tmp_path, hangs, options, doing):
    out = tmp_path / "run"
    process = start(out, 2, [*SMALL, "--max-steps", "100000", "--hang-timeout", "5", *options])
    until(lambda: newest_checkpoint(out), process, out)
    time.sleep(1)  # the first evaluation has begun
    frozen = ranks_of(process.pid)[hangs]
    os.kill(frozen, signal.SIGSTOP)
    report = out / f"hang-rank{1 - hangs}.txt"
    try:
        until(report.exists, process, out, seconds=60)
        time.sleep(2)  # torchrun sees who ended first; the frozen one it would give 30 s to save
    finally:
        os.kill(frozen, signal.SIGKILL)
    assert end(process) != 0
    assert f"exitcode  : {HUNG}" in log_of(out)
    assert re.search(doing, report.read_text())


def test_the_watchdog_ends_the_process_where_even_its_report_hangs(tmp_path):
    os.mkfifo(
        tmp_path / "hang-rank0.txt"
    )  # like a file on a disk that does not answer: opening it never returns
    hang = "import time; Watchdog(1.0, Path(sys.argv[1]), World()); time.sleep(100)"
    imports = (
        "import sys; from pathlib import Path; from nanovlm_fast.ranks import World; "
        "from nanovlm_fast.training.watchdog import Watchdog; "
    )
    result = run_python("-c", imports + hang, str(tmp_path))
    assert result.returncode == HUNG and "rank 0 hangs: starting" in result.stderr


def test_a_signal_in_the_last_evaluation_says_that_something_is_left_to_do(tmp_path):
    out, options = (
        tmp_path / "run",
        [*SMALL, "--max-steps", "5", "--data", "synthetic:500", "--final-eval"],
    )
    process = start(out, 1, [*options, "--auto-resume"])
    until((out / "curves.png").exists, process, out)
    process.send_signal(signal.SIGTERM)
    assert end(process) == SAVED and not (out / "result.json").exists()
    assert end(start(out, 1, [*options, "--auto-resume"])) == 0 and (out / "result.json").exists()


def test_an_evaluation_that_was_cut_short_is_done_again(tmp_path):
    """The checkpoint of its step is there but its score is not, or is in metrics.jsonl only."""
    out, options = tmp_path / "run", [*SMALL, "--val-samples", "8", "--eval-every", "4"]
    assert end(start(out, 1, [*options, "--max-steps", "4"])) == 0
    file = out / "last" / "state.json"
    state = json.loads(file.read_text())
    assert (state["evaluated"], state["best_step"]) == (4, 4)
    file.write_text(json.dumps({**state, "evaluated": 0, "best_step": None, "best_accuracy": -1.0}))
    (out / "best").unlink()
    assert end(start(out, 1, [*options, "--max-steps", "6", "--resume"])) == 0, log_of(out)[-3000:]
    assert [line["step"] for line in read_metrics(out) if "accuracy" in line] == [4, 6]
    assert (out / "best").resolve().name in ("step-000004", "step-000006")


def test_a_start_that_was_killed_before_it_was_a_run_can_be_repeated(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json").write_text('{"preset"')
    assert end(start(out, 1, [*SMALL, "--max-steps", "2", "--auto-resume"])) == 0, log_of(out)[
        -3000:
    ]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("processes", "count", "steps"), [(1, 12, 600), (2, 3, 75)])
def test_kills_leave_no_trace(tmp_path, monkeypatch, processes, count, steps):
    """`python -m bench.reliability` takes 25 kills each, and starts Python anew after each."""
    monkeypatch.setattr(reliability, "start", start)
    result = reliability.kills(tmp_path, processes, count, steps)
    assert result["kills"] == count and result["losses_equal"]
    # Every third kill waits for a save; a save that ends in the same moment is missed.
    assert result["in_a_save"] >= (2 if count > 6 else 1)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_long_run_grows_neither_memory_nor_files_nor_processes(tmp_path):
    """Half as many resumes as `python -m bench.reliability` has in 2,000 steps, closer together."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Small batches: what a step leaves behind does not depend on its size.
    options = ["--device", "cpu", "--log-every", "20", "--tokens-per-batch", "1280"]
    result = reliability.soak(tmp_path / "run", steps=200, every=20, options=options)
    torch.set_num_threads(threads)
    growth = result["growth"]
    assert growth["host_bytes"] < 0.02, growth  # memory that is given back is no leak
    assert growth["device_bytes"] < 0.02, growth
    assert growth["files"] == growth["children"] == growth["threads"] == 0, result["samples"]


# ---- checkpoints


def small() -> tuple[VisionLanguageModel, list[torch.optim.Optimizer], Tokenizer]:
    torch.manual_seed(0)
    model = VisionLanguageModel(parse_config(SMALL)[0])
    return model, make_optimizers(model, TrainConfig()), Tokenizer.train(["what is it?"] * 3, 384)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The state at the time of the call is written, whatever changes meanwhile."""
    model, optimizers, tokenizer = small()
    before = {name: tensor.clone() for name, tensor in model.reference_state_dict().items()}
    held, real = threading.Event(), checkpoints.save_file

    def slow_disk(*args):
        assert held.wait(60)
        real(*args)

    monkeypatch.setattr(checkpoints, "save_file", slow_disk)
    checkpointer = Checkpointer(tmp_path, tokenizer)
    checkpointer.save(model, optimizers, {"step": 3}, late=lambda: {"interval": [1, 2]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1  # the next step
    assert newest_checkpoint(tmp_path) is None, "not yet"
    held.set()
    checkpointer.wait()
    folder = newest_checkpoint(tmp_path)
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in written.items())
    assert json.loads((folder / "state.json").read_text()) == {"step": 3, "interval": [1, 2]}


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path, keep):
    model, optimizers, tokenizer = small()
    checkpointer = Checkpointer(tmp_path, tokenizer, keep)
    for step in range(1, 8):
        checkpointer.save(model, optimizers, {"step": step, "best_step": 2 if step >= 2 else None})
    checkpointer.wait()
    kept = sorted(int(folder.name[5:]) for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({2, *range(8 - keep, 8)})


def limited(out: Path, options: list[str], size: int) -> subprocess.CompletedProcess:
    """A run on a disk that accepts no file of more than `size` bytes.

    A write beyond that gets an error from the operating system's kernel.
    """
    command = [sys.executable, "train.py", "--out", str(out), *SMALL, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_leaves_the_old_checkpoint(tmp_path, plain):
    out = tmp_path / "run"
    assert end(start(out, 1, [*SMALL, "--max-steps", "6"])) == 0
    before = {file.name: file.read_bytes() for file in (out / "last").iterdir()}
    size = (out / "last" / "model.safetensors").stat().st_size // 2
    result = limited(out, ["--max-steps", STEPS, "--resume", "--workers", "1"], size)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(
        r"error: the checkpoint of step \d+ could not be written to .*too large.*step-000006", last
    ), last
    assert newest_checkpoint(out).name == "step-000006"
    assert {file.name: file.read_bytes() for file in (out / "last").iterdir()} == before
    assert not list((out / "checkpoints").glob(".tmp-*"))

    result = limited(out, ["--max-steps", STEPS, "--resume", "--on-save-error", "continue"], size)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "training goes on" in result.stdout + result.stderr and len(losses(out)) == int(STEPS)
    assert re.search("warning: .*curves.png could not be written", result.stdout + result.stderr)
    assert not (out / "curves.png").exists()
    assert newest_checkpoint(out).name == "step-000006"


# ---- what is the same, and what is held


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="")],
        ),
    ],
)
def test_two_deterministic_runs_are_equal_bit_for_bit(tmp_path, device):
    runs = [tmp_path / "a", tmp_path / "b"]
    for out in runs:
        assert (
            end(start(out, 1, [*SMALL, "--device", device, "--max-steps", "15", "--deterministic"]))
            == 0
        )
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(out / "last" / file) for out in runs)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), file
    assert losses(runs[0]) == losses(runs[1])


def test_what_a_process_holds_can_be_read():
    held = resources()
    with Path("/dev/null").open() as _:
        more = resources()
    assert more["files"] == held["files"] + 1 and held["host_bytes"] > 2**20
