"""The processes that train together, and what they exchange.

`torchrun --nproc_per_node N train.py ...` starts one process per GPU, a *rank*. Data parallel (DDP)
and sharded (FSDP2) training are in training/parallel.py; this module is what both need. What ranks
must agree on in each step (labels of the step, whether to stop) is a few integers. They travel
between the hosts, over gloo, while the devices still compute the previous step, so that nothing
waits for a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanovlm_fast.ranges import Range

# The first rank evaluates while the others wait, maybe for hours: what is too long is for the
# watchdog to decide, and not for a time limit of gloo.
HOST_TIMEOUT = datetime.timedelta(days=1)
JOIN_TIMEOUT = datetime.timedelta(minutes=10)


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those that train: `rank` of `size`, `local_rank` of those on its machine.

    `local_size` is how many there are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: dist.ProcessGroup | None = None  # gloo, between the hosts

    @classmethod
    def join(cls, device: str = "auto") -> World:
        """Join the processes that torchrun started; without torchrun, a world of one.

        `device` is the value of --device. Raises ValueError if the machine has fewer GPUs than
        processes, and ConnectionError if a rank does not come.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, size, local = (Range(int).read(f"${n}", os.environ.get(n, "")) for n in names)
        here = os.environ.get("LOCAL_WORLD_SIZE", size)
        local_size = Range(int, least=1).read("$LOCAL_WORLD_SIZE", here)
        if size > 1 and device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"--device {device}: each of {size} processes has a GPU of its own: --device cuda"
            )
        end_with_parent()
        on_gpu = device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            if local >= torch.cuda.device_count():
                gpus = torch.cuda.device_count()
                raise ValueError(f"process {local} of this machine has no GPU: it has {gpus}")
            # Before the process group: NCCL takes the current device.
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            store = _store_of_this_start(rank, size)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=HOST_TIMEOUT
            )
        host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        return cls(rank, size, local, local_size, host)

    def __str__(self) -> str:
        return f" · {self.size} processes" if self.size > 1 else ""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process for a --device: with several ranks, its own GPU."""
        on_gpu = self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if on_gpu else name

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum element-wise over the ranks; whole numbers are exact up to 2^53."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with _others_are_there():
            dist.all_reduce(total, group=self.host)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Collect `value`, which JSON can hold, from every rank, in the order of ranks.

        PyTorch's `all_gather_object` would unpickle what other machines send.
        """
        if self.size == 1:
            return [value]
        text = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), np.uint8).copy())
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _others_are_there():
            # All parts of a gather have one size, so the sizes go first and texts are padded.
            dist.all_gather(sizes, torch.tensor([len(text)]), group=self.host)
            padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
            padded[: len(text)] = text
            texts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(texts, padded, group=self.host)
        return [json.loads(bytes(t[: int(n)].numpy())) for t, n in zip(texts, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0])

    def leave(self) -> None:
        """Close the connections to the other ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _others_are_there() -> Iterator[None]:
    """Turn gloo's RuntimeError for a closed connection into a ConnectionError of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"another rank ended, see what it said last ({reason})") from error


def _store_of_this_start(rank: int, size: int) -> dist.Store:
    """torchrun's store, under a prefix of its own.

    The store outlives a restart, and with it the addresses of dead ranks. The first rank therefore
    makes up a prefix, and gives it to each other rank under a name that this rank has just made up:
    nothing of this can be left from an earlier start. (The count of restarts would not do, because
    machines may count differently.) Raises ConnectionError if a rank does not come.
    """
    store, *_ = next(rendezvous("env://", rank, size, timeout=JOIN_TIMEOUT))
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    if rank:
        store.set(f"rank {rank}", mine)
        prefix = store.get(mine).decode()  # waits until the first rank has set it
        store.set(f"{prefix} {rank}", "heard")
        return dist.PrefixStore(prefix, store)
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            # Again in every round: what is there may be of a process that died, whose successor
            # writes its own name later.
            if store.check([f"rank {other}"]):
                store.set(store.get(f"rank {other}").decode(), mine)
            if store.check([f"{mine} {other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            absent = f"number {min(missing)} did not come in {JOIN_TIMEOUT}"
            raise ConnectionError(f"of {size} processes, {absent}")
        time.sleep(0.02)
    return dist.PrefixStore(mine, store)


def end_with_parent() -> None:
    """Have the kernel kill this process when torchrun dies (Linux).

    A rank that outlived its torchrun would still write in the run's folder at the next start.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
