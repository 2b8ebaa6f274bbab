"""Processes that hang, abort or talk nonsense: each costs its time limit and no more.

They are real processes, which do not import torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from nanovlm_fast.tune.launcher import Launcher, environment_with

SERVE = """
import ctypes, json, os, subprocess, sys, time
first = json.loads(sys.stdin.readline())
print("{}", flush=True)
for line in sys.stdin:
    do = json.loads(line)["do"]
    if do == "hang":
        time.sleep(600)
    if do == "hang beside a child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        time.sleep(600)
    if do == "abort":
        os.abort()
    if do == "segfault":
        ctypes.string_at(0)
    if do == "leave":
        sys.exit("the last words")
    print(json.dumps({"did": do, "first": first, "pid": os.getpid()}), flush=True)
"""


@pytest.fixture
def launcher():
    with Launcher(SERVE, {"job": 1}, start_limit=20.0) as made:
        yield made


def test_answers_come_from_one_process_that_ends_with_the_block():
    with Launcher(SERVE, {"job": 1}) as launcher:
        assert launcher.process is None, "started before it was asked"
        answers = [launcher.ask({"do": name}, 20.0)[0] for name in ("one", "two")]
        pid = answers[0]["pid"]
        assert [answer["did"] for answer in answers] == ["one", "two"]
        assert answers[0]["first"] == {"job": 1} and answers[1]["pid"] == pid != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def alive_in(group: int) -> list[str]:
    """The processes of a group, without those that are dead and not yet waited for."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, of = place.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
            found += [place.name] if int(of) == group and state != "Z" else []
    return found


def test_a_process_that_hangs_is_ended_and_replaced(launcher):
    before, _ = launcher.ask({"do": "begin"}, 1.0)
    began = time.monotonic()
    answer, why = launcher.ask({"do": "hang beside a child"}, 1.0)
    assert (answer, why) == ({}, "no answer within 1 s") and time.monotonic() - began < 5
    until = time.monotonic() + 10
    while alive_in(before["pid"]) and time.monotonic() < until:
        time.sleep(0.01)  # they were killed, and only the first was waited for
    assert not alive_in(before["pid"])
    after, why = launcher.ask({"do": "go on"}, 1.0)
    assert why is None and after["pid"] != before["pid"] and after["first"] == {"job": 1}


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("abort", "died of SIGABRT"),
        ("segfault", "died of SIGSEGV"),
        ("leave", "ended with 1: the last words"),
    ],
)
def test_how_a_process_died_is_told(do, reason, launcher):
    answer, why = launcher.ask({"do": do}, 1.0)
    assert answer == {} and why.startswith(reason)
    assert launcher.ask({"do": "go on"}, 1.0)[1] is None


def test_a_process_that_cannot_start_is_told_too():
    with Launcher("raise SystemExit('no such device')", {}) as launcher:
        assert launcher.ask({}, 20.0) == ({}, "ended with 1: no such device")


def test_the_environment_is_this_ones_with_changes(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    found = environment_with({"OMP_WAIT_POLICY": None, "OMP_NUM_THREADS": "7"})
    assert "OMP_WAIT_POLICY" not in found and found["OMP_NUM_THREADS"] == "7"
    assert found["PATH"] == os.environ["PATH"]


def test_closing_does_not_wait_for_a_process_that_cannot_be_ended(launcher, monkeypatch):
    """As one that waits in a driver: here the signal is lost."""
    launcher.ask({"do": "one"}, 20.0)
    process = launcher.process
    monkeypatch.setattr("nanovlm_fast.tune.launcher.END_LIMIT", 0.1)
    with monkeypatch.context() as lost:
        lost.setattr(os, "killpg", lambda *_: None)
        # Its input stays open, or it would end by itself.
        kept = os.dup(process.stdin.fileno())
        launcher.close()
    assert launcher.process is None and process.poll() is None
    os.close(kept)
    process.kill()
    process.wait(20)
