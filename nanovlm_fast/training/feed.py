"""Batches on the device, copied while the previous step still computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

from nanovlm_fast.data.stream import StreamBatch
from nanovlm_fast.packing.batch import PackedBatch

AHEAD = 3  # batches that the host may be ahead of the device; more would only take memory


class Feed:
    """An iterator over a loader's batches, each as it came and on the device.

    Copies run on a CUDA stream of their own. With `trim`, the batch on the device is without its
    padding.
    """

    def __init__(self, batches: Iterator[StreamBatch], device: torch.device, trim: bool = False):
        self.batches = batches
        self.device = device
        self.trim = trim
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.seconds = 0.0  # waited for the loader, on a CPU
        # Pairs of events: the device needs the batch, and the batch is on the device.
        self.marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> tuple[StreamBatch, PackedBatch]:
        if self.copies is None:
            asked = time.perf_counter()
            batch, packed = self._next_on_device()
            self.seconds += time.perf_counter() - asked
            return batch, packed
        needed = torch.cuda.Event(enable_timing=True)
        arrived = torch.cuda.Event(enable_timing=True)
        compute = torch.cuda.current_stream(self.device)
        # Reached once the previous step is done: from there on the device would wait.
        needed.record(compute)
        with torch.cuda.stream(self.copies):
            batch, packed = self._next_on_device()
            arrived.record(self.copies)
        compute.wait_event(arrived)
        # Or the allocator would give the memory to the next copy while the step still reads it.
        packed.record_stream(compute)
        self.marks.append((needed, arrived))
        # Or the batches of many steps would lie on the device before the first step is done.
        if len(self.marks) > AHEAD:
            self.marks[-AHEAD][0].synchronize()
        return batch, packed

    def _next_on_device(self) -> tuple[StreamBatch, PackedBatch]:
        batch = next(self.batches)
        packed = batch.packed.trimmed() if self.trim else batch.packed
        return batch, packed.to(self.device)

    def waited(self) -> float:
        """Seconds that the device waited for batches since the last call.

        Only pairs of events that have already passed count; reading others would wait for them.
        """
        seconds = self.seconds
        self.seconds = 0.0
        while self.marks and all(event.query() for event in self.marks[0]):
            needed, arrived = self.marks.popleft()
            # Negative when the batch arrived before the device needed it.
            seconds += max(needed.elapsed_time(arrived), 0.0) / 1e3
        return seconds
