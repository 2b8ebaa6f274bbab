"""The worker processes that decode, tokenise and pack.

A run must survive a worker that dies (killed for its memory, mostly), and no worker may survive its
run: one that did would hold the memory and the files of the next.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from nanovlm_fast.data.stream import PackedStream, StreamBatch, advance
from nanovlm_fast.threads import cores_of

MOST_WORKERS = 16  # that are started unasked: each may keep 1 GiB of decoded examples
CGROUP = Path("/sys/fs/cgroup")  # a container sees its own limits here
PARENT_SECONDS = 0.5  # between a worker's checks that its parent is alive


def workers_for(on_gpu: bool, processes: int = 1) -> int:
    """How many workers a training process takes when it is not told (--workers -1).

    A GPU takes batches faster than one worker makes them: it gets its process's cores, less two for
    training itself and for pinning and copying. These are the cores that the process may use, but
    no more than its part of what the `processes` of this machine share: the cores of their parent,
    and the container's quota. torchrun's processes may all use their parent's cores, where those of
    Slurm and `numactl` can have cores of their own. On a CPU the model needs the cores, and one
    worker is enough.
    """
    if not on_gpu:
        return 1
    shared = min(cores_of(os.getppid()), _quota())
    cores = min(usable_cores(), int(shared // processes))
    return max(1, min(MOST_WORKERS, cores - 2))


def usable_cores() -> int:
    """Cores that this process may use, which in a container or under Slurm are not all.

    At least one, and rounded down where a container's quota has a fraction.
    """
    return max(1, int(min(cores_of(), _quota())))


def _quota() -> float:
    """Cores' worth of time that the container may use, infinite without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup 2, 1
        try:
            # Microseconds of computing, per microseconds that pass
            quota, period = " ".join((CGROUP / name).read_text() for name in names).split()
            cores = int(quota) / int(period)
        except (OSError, ValueError):  # another version of cgroup; "max"
            continue
        if cores > 0:  # -1: no limit
            return cores
    return math.inf


def batches_of(
    stream: PackedStream, pin_memory: bool = False, lives: int = 3
) -> Iterator[StreamBatch]:
    """The batches of the stream. Dead workers are replaced without losing or repeating a batch.

    That is done up to `lives` times per run. Raises OSError when they die more often; the batches
    before are not affected.
    """
    while True:
        try:
            iterator = iter(loader(stream, pin_memory))
            # torch's handler raises wherever the main thread is when a worker dies, perhaps in the
            # middle of a step. Without it the loader finds out when it next waits for that worker.
            # After `iter`, which installs the handler
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for batch in iterator:
                yield batch
                # After the yield: batches that are prefetched but not used are packed again
                stream.states = advance(stream.states, batch)
            return
        # EOFError, ConnectionError: the worker died while it was handing over a batch
        except (RuntimeError, EOFError, ConnectionError) as error:
            # torch has no class of its own for a dead worker. Other RuntimeErrors are bugs
            died = any(what in str(error) for what in ("DataLoader worker", "Pin memory thread"))
            if isinstance(error, RuntimeError) and not died:
                raise
            lives -= 1
            if lives < 0:
                raise OSError(f"loader workers die again and again, the last: {error}") from error
            reason = str(error) or "a loader worker died over a batch"
            print(f"warning: {reason}; new workers go on from the same batch")


def loader(stream: PackedStream, pin_memory: bool = False) -> DataLoader:
    """Batches of the stream: one process per shard, or all in this process with --workers 0."""
    # Threads of `tokenizers` do not survive the fork of a worker, and it warns of each
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workers = len(stream.states) if stream.load.train.workers else 0
    return DataLoader(
        stream,
        batch_size=None,
        # A loader draws a seed for its workers. From the global generator, each start would shift
        # its state, and a resumed run would differ
        generator=torch.Generator(),
        num_workers=workers,
        collate_fn=as_is,  # the default would make tensors of the counts
        worker_init_fn=begin_worker,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,  # torch refuses a number without workers
    )


def begin_worker(worker: int) -> None:
    """Run first by each worker of a data loader."""
    leave_signals_to_the_parent()
    threading.Thread(target=end_with_the_parent, daemon=True, name="parent").start()


def end_with_the_parent() -> None:
    """Wait until the parent is gone, even if killed, and end this process, whatever it is doing.

    The loader itself checks for its parent only between two batches. PR_SET_PDEATHSIG is no
    replacement: it is sent when the thread that started the worker ends, not only with its process.
    """
    parent = multiprocessing.parent_process()
    while parent is not None and os.getppid() == parent.pid:
        time.sleep(PARENT_SECONDS)
    os._exit(1)  # not sys.exit, which ends only this thread


def leave_signals_to_the_parent() -> None:
    """Ignore the signals by which a run is ended.

    Ctrl-C and a scheduler's SIGTERM reach every process of a group, but the parent still needs
    batches to save its state. A worker ends when the loader says so or when its parent is gone.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill the workers of loaders that are still open.

    multiprocessing ends daemons with SIGTERM and waits for them, and these ignore it.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def as_is(item: Any) -> Any:
    """A `collate_fn` for items that are batches already. Not a lambda, which cannot be pickled."""
    return item
