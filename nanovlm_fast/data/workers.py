"""The processes that decode, tokenise and pack."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from nanovlm_fast.data.stream import PackedStream, StreamBatch, advance

PARENT_SECONDS = 0.5  # between a worker's looks for its parent


def batches_of(
    stream: PackedStream, pin_memory: bool = False, lives: int = 3
) -> Iterator[StreamBatch]:
    """The stream's batches; workers that die are replaced, `lives` times in a run, and no batch is lost or repeated.

    Raises OSError when they die more often. Batches before are not affected.
    """
    while True:
        try:
            iterator = iter(loader(stream, pin_memory))
            # torch's handler raises wherever the main thread is when a worker dies, in the middle of a step perhaps;
            # without it the loader finds out when it next waits for that worker
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for batch in iterator:
                yield batch
                stream.states = advance(stream.states, batch)
            return
        except (
            RuntimeError,
            EOFError,
            ConnectionError,
        ) as error:  # the latter: a batch that it was handing over
            died = any(what in str(error) for what in ("DataLoader worker", "Pin memory thread"))
            if isinstance(error, RuntimeError) and not died:
                raise
            lives -= 1
            if lives < 0:
                raise OSError(f"loader workers die again and again, the last: {error}") from error
            print(
                f"warning: {str(error) or 'a loader worker died over a batch'}; new workers go on from the same batch"
            )


def loader(stream: PackedStream, pin_memory: bool = False) -> DataLoader:
    """Batches of the stream: one process a shard, or all shards in this process with --workers 0."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workers = len(stream.states) if stream.load.train.workers else 0
    return DataLoader(
        stream,
        batch_size=None,
        generator=torch.Generator(),  # or each start draws from the global one: a resumed run would differ
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=begin_worker,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def begin_worker(worker: int) -> None:
    """What each process of a data loader does first."""
    leave_signals_to_the_parent()
    threading.Thread(target=end_with_the_parent, daemon=True, name="parent").start()


def end_with_the_parent() -> None:
    """Wait until the parent is gone, killed perhaps, and end this process, whatever it is doing.

    The loader itself looks for its parent only between two batches. (PR_SET_PDEATHSIG would come
    when the thread that started the worker ends, and not only with its process.)
    """
    parent = multiprocessing.parent_process()
    while os.getppid() == parent.pid:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def leave_signals_to_the_parent() -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group, but only the parent decides what they mean."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(
            signum, signal.SIG_IGN
        )  # a worker ends when the loader says so, or when its parent is gone


@atexit.register
def _end_workers() -> None:
    """Whoever exits without having closed a loader would wait without end for workers that ignore SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _as_is(batch: StreamBatch) -> StreamBatch:
    return batch
