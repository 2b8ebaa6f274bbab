"""Start train.py and `python -m nanovlm_fast.*` without the seconds that their imports take.

The programs run in forks of a process that has imported everything already.

The result is a process like any other: it has a pid, takes signals, starts children, ends with an
exit code, and shares nothing with the tests. It does not prove that a program starts from nothing,
nor that everything is freed at its end. `processes.run_python` and torchrun start Python anew. So
does everything here on a machine with a GPU, whose driver does not survive a fork, and wherever an
environment variable differs that a library may read while it is imported, except for those of the
hub: its libraries are imported anew.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
# what every run imports, and the programs, which are then forgotten: they must run, not be there
LIBRARIES = (
    "torch._dynamo",
    "transformers.hf_argparser",
    "matplotlib.pyplot",
    "nanovlm_fast.reporting.summary",
)
PROGRAMS = (
    "train",
    *(f"nanovlm_fast.{name}" for name in ("evaluate", "generate", "export", "data.prepare")),
)
# Read only once a program runs: `datasets` and `wandb` are not imported before. What a loader and
# --deterministic set in the tests' own process is read where it is used.
RANK = (
    "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID "
    "TORCHELASTIC_USE_AGENT_STORE"
)
MAY_DIFFER = {
    "PYTEST_CURRENT_TEST",
    "HF_DATASETS_CACHE",
    "WANDB_MODE",
    "WANDB_CACHE_DIR",
    "TOKENIZERS_PARALLELISM",
    "CUBLAS_WORKSPACE_CONFIG",
    *RANK.split(),
}
# Read while these libraries are imported. Where one differs, a fork imports them anew, which takes
# it a second: the programs import them in functions and so hold nothing of the first import.
HUB = {"HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_ETAG_TIMEOUT"}
HUBS_LIBRARIES = {"huggingface_hub", "transformers"}
PATIENCE = 280.0  # seconds
STATUS_BYTES = 4


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **ALONE, **changes}


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The program in the repository root, on one thread; what it printed and its exit code."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(arguments, out, err, **env)
        try:
            code = process.wait(PATIENCE)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


def start(arguments: Sequence[str], out: IO, err: IO, **env: str) -> Fork | subprocess.Popen:
    """What `run` runs, as leader of a process group of its own."""
    nursery, env = the_nursery(), environment(**env)
    if nursery is None or nursery.differs(env):
        command = [sys.executable, *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True
        )
    return nursery.fork({"arguments": list(arguments), "env": env}, out, err)


def run_ranks(arguments: Sequence[str], count: int, log: IO, wait_for_all: bool = False) -> int:
    """Run the program in `count` processes, with the environment that torchrun gives to its own.

    Returns 0, or the exit code of the first process that fails. The others are then killed, unless
    `wait_for_all` lets them end too. They are also killed if they take too long.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    told |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        start(arguments, log, log, RANK=str(rank), LOCAL_RANK=str(rank), **told)
        for rank in range(count)
    ]
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            codes = [rank.poll() for rank in ranks]
            if None not in codes or (any(codes) and not wait_for_all):
                return next(filter(None, codes), 0)
            time.sleep(0.02)
        raise subprocess.TimeoutExpired(arguments[0], PATIENCE)
    finally:
        for rank in ranks:
            rank.kill()


def can_fork() -> bool:
    """False where processes must start anew."""
    return not torch.cuda.is_available() and hasattr(os, "pidfd_open")


@cache
def the_nursery() -> Nursery | None:
    """The one of this process, started by the first test that asks for it.

    Not while tests are collected: modules that are imported later may still set variables.
    """
    return Nursery() if can_fork() else None


class Nursery:
    """The process that forks. It ends when this one does: it reads the end of the connection."""

    def __init__(self) -> None:
        self.env, self.lock = environment(), threading.Lock()
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(command, cwd=ROOT, env=self.env, pass_fds=[theirs.fileno()])
        theirs.close()
        atexit.register(self.close)

    def close(self) -> None:
        self.connection.close()
        self.process.wait()

    def differs(self, env: dict[str, str]) -> bool:
        names = (env.keys() | self.env.keys()) - MAY_DIFFER - HUB
        return any(env.get(name) != self.env.get(name) for name in names)

    def fork(self, request: dict, out: IO, err: IO) -> Fork:
        status, report = os.pipe()
        with self.lock:  # tests have threads
            socket.send_fds(
                self.connection,
                [json.dumps(request).encode()],
                [out.fileno(), err.fileno(), report],
            )
            pid = int(self.connection.recv(64))
        os.close(report)
        return Fork(pid, status)


class Fork:
    """As much of subprocess.Popen as tests ask for."""

    def __init__(self, pid: int, status: int):
        self.pid, self.status, self.returncode = pid, status, None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.status, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
            status = int.from_bytes(os.read(self.status, STATUS_BYTES), "little")
            os.close(self.status)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# ---- the other process


def serve(connection: socket.socket) -> tuple[dict, list[int]]:
    """Fork a process for every request.

    Returns only in the forks, with the request and the file descriptors for output and errors.
    """
    selector, open_fds = selectors.DefaultSelector(), set()
    selector.register(connection, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not connection:  # a fork has ended
                pid, report = key.data
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    os.write(report, status.to_bytes(STATUS_BYTES, "little"))
                selector.unregister(key.fd)
                for fd in (key.fd, report):
                    os.close(fd)
                    open_fds.remove(fd)
                continue
            message, fds, _, _ = socket.recv_fds(connection, 2**20, 3)
            if not message:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                selector.close()
                connection.close()
                for fd in (*open_fds, fds[2]):
                    os.close(fd)
                return json.loads(message), fds[:2]
            connection.send(str(pid).encode())
            os.close(fds[0])
            os.close(fds[1])
            ended = os.pidfd_open(pid)
            open_fds |= {ended, fds[2]}
            selector.register(ended, selectors.EVENT_READ, (pid, fds[2]))


def become(request: dict, fds: list[int]) -> None:
    """Run the program in this process as Python does."""
    program, *rest = request["arguments"]
    os.setsid()
    for fd, place in zip(fds, (1, 2), strict=True):
        os.dup2(fd, place)
        os.close(fd)
    if any(os.environ.get(name) != request["env"].get(name) for name in HUB):
        for name in [name for name in sys.modules if name.partition(".")[0] in HUBS_LIBRARIES]:
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(request["env"])
    sys.orig_argv = [sys.executable, *request["arguments"]]
    sys.path[0] = str(ROOT)  # where `python -m` and the programs there find their modules
    if program == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *rest]
        runpy.run_path(program, run_name="__main__")


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = str(ROOT)
    for name in (*LIBRARIES, *PROGRAMS):
        importlib.import_module(name)
    for name in PROGRAMS:
        del sys.modules[name]
    early = {"datasets", "wandb"} & set(sys.modules)
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert not early and threads == 1, (
        f"{early} is there already, {threads} threads: forks would not be sound"
    )
    gc.collect()
    gc.freeze()  # no collection in a fork need look at it, and copy its pages
    request, fds = serve(connection)
    leave = Leave()
    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        become(request, fds)
        leave.code = 0
    except SystemExit as error:
        leave.code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except KeyboardInterrupt:
        leave.code = None
        raise


class Leave:
    """Ends the process where Python would begin to take itself apart, which takes it a second."""

    code: int | None = 1  # None: Python knows better, it dies by the signal

    def __call__(self) -> None:
        if self.code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code & 0xFF)


if __name__ == "__main__":
    main()
