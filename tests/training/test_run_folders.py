"""The folder of a run: only one command uses it at a time.

Nothing is lost before something better has replaced it. Nothing is mocked.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.reliability import SMALL, losses, start
from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data import prepare
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.ranks import World
from nanovlm_fast.runs import (
    _clear,
    _move_aside,
    beginning,
    check_run_folder,
    has_checkpoint,
    is_stub,
    latest_run,
    load_run_config,
    locked,
    restore,
    save_run_config,
    standing,
)
from nanovlm_fast.weights.folder import resolve
from tests.support import forks
from tests.support.processes import ROOT
from tests.support.runs import TINY, contents

HOLDER = """
import sys, time
from pathlib import Path
from nanovlm_fast.runs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[int]:
    """Have another process work in the folder; gives its id."""
    call = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process.pid
        finally:
            process.kill()


def until(condition, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(log.read_text()[-3000:])
        time.sleep(0.005)


def main(loop, capsys, out: Path, options: str, model: list[str] = TINY) -> tuple[int, str]:
    """The exit code and the error of `train.py`, called in this process with what it refuses."""
    capsys.readouterr()
    code = loop.main([*model, "--hang-timeout", "0", "--out", str(out), *options.split()])
    return code, capsys.readouterr().err.strip().splitlines()[-1]


# ---- one command at a time


@pytest.mark.parametrize("options", ["", "--resume", "--auto-resume", "--overwrite"])
def test_a_second_command_on_a_folder_is_refused_in_one_line(loop, copy, capsys, options):
    before = contents(copy)
    with held(copy) as pid:
        code, error = main(loop, capsys, copy, f"{options} --max-steps 1")
    assert code == 1
    owner = rf"process {pid} on host {socket.gethostname()} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"error: {copy} is in use by {owner}: .*--out.*", error), error
    assert {name: text for name, text in contents(copy).items() if name != ".lock"} == before


def test_prepare_on_a_folder_that_another_prepares_is_refused(tmp_path, capsys):
    with held(tmp_path / "shards") as pid:
        assert prepare.main(f"--data synthetic:32 --workers 0 --out {tmp_path}/shards".split()) == 1
    assert f"is in use by process {pid} on host" in capsys.readouterr().err
    assert prepare.main(f"--data synthetic:32 --workers 0 --out {tmp_path}/shards".split()) == 0, (
        "a stale lock"
    )
    assert not (tmp_path / "shards" / ".lock").exists()


def test_all_ranks_hear_that_a_folder_is_in_use(tmp_path):
    out = tmp_path / "run"
    with held(out) as pid:
        call = ["train.py", "--out", str(out), *SMALL, "--max-steps", "1"]
        with (tmp_path / "log").open("w+") as log:
            assert forks.run_ranks(call, 2, log, wait_for_all=True) != 0
    said = (tmp_path / "log").read_text()
    assert said.count(f"error: {out} is in use by process {pid}") == 2, said[-3000:]
    assert not contents(out).keys() - {".lock"}


def test_a_start_leaves_nothing_but_what_was_there(tmp_path):
    with pytest.raises(ValueError), locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
        raise ValueError
    assert not (tmp_path / "a").exists()


# ---- --overwrite


@pytest.mark.slow
def test_a_run_is_replaced_at_the_first_checkpoint_of_the_next(tmp_path, loop, capsys):
    """If the next run is killed before its first checkpoint, the old run is restored.

    Nothing stays locked, although a worker outlives the killed process.
    """
    out = tmp_path / "runs" / "run"
    out.parent.mkdir()
    log = out.with_suffix(".log")
    assert start(out, 1, [*SMALL, "--max-steps", "3", "--seed", "7"]).wait(200) == 0, (
        log.read_text()[-3000:]
    )
    before = contents(out)

    again = [*SMALL, "--max-steps", "100000", "--save-every", "0", "--overwrite"]
    process = start(out, 1, again)
    until(lambda: (out / ".replaced").exists() and len(losses(out)) >= 3, process, log)
    assert contents(out / ".replaced") == before and not has_checkpoint(out)
    assert standing(out) == out / ".replaced" and latest_run(out.parent) == out
    code, error = main(loop, capsys, out, "--resume", SMALL)
    assert code == 1 and f"in use by process {process.pid} on host" in error

    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (worker,) = (int(c) for c in children if b"train.py" in Path(f"/proc/{c}/cmdline").read_bytes())
    os.kill(worker, signal.SIGSTOP)  # acts as if it could not be reached
    try:
        process.kill()
        process.wait()
        assert Path(f"/proc/{worker}").exists() and (out / ".lock").exists()
        assert parse_config(["--resume", "--out", str(out)])[1].seed == 7, (
            "the run that was not replaced"
        )
        code, error = main(loop, capsys, out, "--max-steps 1", SMALL)
        assert code == 1 and "holds a run" in error
        assert contents(out) == before, "back, as it was"
    finally:
        os.kill(worker, signal.SIGKILL)

    again[again.index("100000")] = "2"
    assert start(out, 1, again).wait(200) == 0, log.read_text()[-3000:]
    assert list(losses(out)) == [1, 2] and load_run_config(out)["seed"] == 0
    assert not any(name.startswith(".") for name in contents(out)), "of the old one nothing is left"
    assert f"kept in {out}/.replaced until the new one has a checkpoint" in log.read_text()


def old_run(folder: Path) -> dict[str, bytes]:
    (folder / "checkpoints" / "step-000003").mkdir(parents=True)
    (folder / "checkpoints" / "step-000003" / "model.safetensors").write_text("old weights")
    (folder / "last").symlink_to("checkpoints/step-000003")
    for name in ("config.json", "metrics.jsonl", "notes.txt"):
        (folder / name).write_text(f"old {name}")
    return contents(folder)


def new_run(folder: Path) -> None:
    (folder / "checkpoints" / ".tmp-step-000001").mkdir(parents=True)
    for name in ("config.json", "checkpoints/.tmp-step-000001/half", "metrics.jsonl"):
        (folder / name).write_text(f"new {name}")


def failing_at(call: int, action) -> bool:
    """Run the action in a process in which one change of the file system fails.

    The first `call` changes succeed, and the next one fails. Returns whether the action came that
    far.
    """
    pid = os.fork()
    if pid == 0:
        left = [call]

        def watch(event: str, arguments: tuple) -> None:
            if event in ("os.rename", "os.mkdir", "open"):
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(28, "No space left on device")

        sys.addaudithook(watch)
        with contextlib.suppress(OSError):
            action()
        os._exit(9 if left[0] < 0 else 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_a_start_that_fails_anywhere_leaves_the_old_run_in_place(tmp_path):
    run = tmp_path / "run"

    def begin() -> None:
        with beginning(run, False, World()):
            new_run(run)

    before, at = old_run(run), 1  # the first one makes a folder that exists
    while failing_at(at, begin):
        assert contents(run) == before, at
        at += 1
    assert at > 8 and (run / "config.json").read_text() == "new config.json"
    assert contents(run / ".replaced") == before


def test_a_start_that_is_refused_says_that_the_old_run_is_back(tmp_path, capsys):
    """As when Weights & Biases refuses: its error alone would leave the old run in doubt."""
    run = tmp_path / "run"
    before = old_run(run)
    with pytest.raises(OSError, match="no key"), beginning(run, False, World()):
        new_run(run)
        raise OSError("--wandb: no key")
    assert contents(run) == before
    kept, back = capsys.readouterr().out.splitlines()
    assert "is kept in" in kept and back == (
        f"{run}: the run that was to be replaced is back: the new one did not begin"
    )


def test_the_checkpoints_of_a_run_that_is_kept_aside_are_found_by_its_name(tmp_path):
    run = tmp_path / "run"
    old_run(run)
    weights = run / ".replaced" / "checkpoints" / "step-000003"
    with beginning(run, False, World()):
        new_run(run)
        for name in ("last", "checkpoints/step-000003", "."):
            assert resolve(run / name).resolve() == weights, name
        with pytest.raises(FileNotFoundError, match=r"run/nonsense: neither"):
            resolve(str(run / "nonsense"))


def killed_after(calls: int, action) -> bool:
    """Run the action in a process that dies after `calls` changes of the file system.

    Returns whether it died, rather than completing the action.
    """
    pid = os.fork()
    if pid == 0:
        left = [calls]

        def watch(event: str, arguments: tuple) -> None:
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(watch)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_killed_at_any_moment_the_old_run_comes_back_whole(tmp_path):
    """The kill comes at any moment of the replacement.

    That is while the old run is moved aside, while the new one begins, or while the old one is
    moved back.
    """
    run = tmp_path / "run"

    def replace() -> None:
        _move_aside(run)
        new_run(run)

    for at in range(100):
        shutil.rmtree(run, ignore_errors=True)
        before = old_run(run)
        died = killed_after(at, replace)
        where = standing(run)
        assert (where / "config.json").read_text() == "old config.json", at
        for again in (1, 4, 7):  # the command that puts it back dies as well
            killed_after(again, lambda: restore(run))
            where = standing(run)
            assert (where / "config.json").read_text() == "old config.json", (at, again)
        restore(run)
        assert contents(run) == before and (run / "last").is_symlink(), at
        if not died:
            break
    assert 10 < at < 99


def test_once_there_is_a_checkpoint_what_was_replaced_never_comes_back(tmp_path):
    run = tmp_path / "run"
    old_run(run)
    _move_aside(run)
    old_run(run)
    (run / "config.json").write_text("new config.json")
    assert standing(run) == run
    for at in (1, 3):
        killed_after(at, lambda: restore(run))
    restore(run)
    assert (run / "config.json").read_text() == "new config.json"
    assert not (run / ".replaced").exists() and has_checkpoint(run)


@pytest.mark.parametrize(
    ("project", "said"), [("a/b", "Invalid project name 'a/b'"), ("plain", "API key")]
)
@pytest.mark.parametrize("options", ["--overwrite", "--resume --epochs 9", ""])
def test_weights_and_biases_may_refuse_and_nothing_is_lost(
    loop, copy, capsys, monkeypatch, project, said, options
):
    tmp_path = copy.parent
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    out, before = copy if options else tmp_path / "new" / "run", contents(copy)
    code, error = main(loop, capsys, out, f"{options} --wandb --wandb-project {project}")
    assert code == 1 and error.startswith("error: --wandb: ") and said in error, error
    assert contents(copy) == before and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_outlives_weights_and_biases(tmp_path, monkeypatch):
    """The service of Weights & Biases dies in the middle of the run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "run"
    options = [*SMALL, "--max-steps", "150", "--wandb", "--final-eval", "--save-every", "0"]
    process = start(out, 1, options)
    log = out.with_suffix(".log")
    until(lambda: len(losses(out)) >= 3, process, log)
    services = [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if _cmdline(folder).find(b"wandb-core") >= 0
        and str(process.pid).encode() in _cmdline(folder)
    ]
    assert services
    for service in services:
        os.kill(service, signal.SIGKILL)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    assert len(losses(out)) == 150 and (out / "result.json").exists()
    assert log.read_text().count("warning: no more is logged to Weights & Biases") == 1


def _cmdline(folder: Path) -> bytes:
    with contextlib.suppress(OSError):
        return (folder / "cmdline").read_bytes()
    return b""


# ---- what a killed start leaves


def test_a_stub_does_not_block_the_same_command_and_a_run_does(tmp_path):
    run, config = tmp_path / "run", TrainConfig()
    run.mkdir()
    save_run_config(run, VLMConfig(), config)
    Tokenizer.train(["what is it?"] * 3, 384).save(run)
    for name in ("wandb", "checkpoints/.tmp-step-000003"):
        (run / name).mkdir(parents=True)
    for name in ("metrics.jsonl", ".metrics.jsonl", ".lock", "hang-rank1.txt"):
        (run / name).touch()
    check_run_folder(run, config)
    assert is_stub(run)
    for name, text in (
        ("notes.txt", ""),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("checkpoints/step-000003/x", ""),
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
        with pytest.raises(ValueError, match="holds a run"):
            check_run_folder(run, config)
        (run / name).write_text("")
        (run / name).unlink() if name != "metrics.jsonl" else None
    _clear(run)
    check_run_folder(run, config)


@pytest.mark.parametrize("options", ["", "--overwrite"])
def test_a_full_disk_at_the_start_is_named_and_changes_nothing(
    loop, copy, tmp_path, capsys, options
):
    """A real limit on the size of files makes the first write fail."""
    out = copy if options else tmp_path / "new"
    before = contents(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        code, error = main(loop, capsys, out, f"--workers 0 {options}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert re.search(rf"error: .*too large: '{out}/config.json'$", error), error
    assert contents(copy) == before and (options or not out.exists())
