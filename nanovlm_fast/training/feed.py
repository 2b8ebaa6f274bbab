"""Batches on the device, copied while the step before still computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

from nanovlm_fast.data.stream import StreamBatch
from nanovlm_fast.packing.batch import PackedBatch

AHEAD = 3  # batches that the host may be ahead of the device


class Feed:
    """Batches of a loader on the device: copied on a stream of their own, while the step before still computes.

    Iterating gives each batch as it came, and its packed batch on the device; with `trim` that is without its padding.
    """

    def __init__(self, batches: Iterator[StreamBatch], device: torch.device, trim: bool = False):
        self.batches, self.device, self.trim = batches, device, trim
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.seconds = 0.0
        self.marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = (
            deque()
        )  # the device needed it; it was there

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> tuple[StreamBatch, PackedBatch]:
        asked = time.perf_counter()
        if self.copies is None:
            batch, packed = self._next_on_device()
            self.seconds += time.perf_counter() - asked
            return batch, packed
        needed, there = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        compute = torch.cuda.current_stream(self.device)
        needed.record(compute)  # reached once the step before is done
        with torch.cuda.stream(self.copies):
            batch, packed = self._next_on_device()
            there.record(self.copies)
        compute.wait_event(there)
        packed.record_stream(compute)
        self.marks.append((needed, there))
        if (
            len(self.marks) > AHEAD
        ):  # or the batches of many steps would lie on the device before the first is done
            self.marks[-AHEAD][0].synchronize()
        return batch, packed

    def _next_on_device(self) -> tuple[StreamBatch, PackedBatch]:
        batch = next(self.batches)
        return batch, (batch.packed.trimmed() if self.trim else batch.packed).to(self.device)

    def waited(self) -> float:
        """Seconds that the device stood waiting for a batch since the last call, so far as known without waiting."""
        seconds, self.seconds = self.seconds, 0.0
        while self.marks and all(event.query() for event in self.marks[0]):
            needed, there = self.marks.popleft()
            seconds += max(needed.elapsed_time(there), 0.0) / 1e3
        return seconds
