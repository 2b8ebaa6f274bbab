"""What a run reports: speed as the field counts it, and the log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Counts between two log lines. Tokens are nanoVLM's: text and image tokens of real documents, never padding.

    Time is wall-clock with the wait for data in it; `wait` is that share.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.counts = {"tokens": 0, "labels": 0, "images": 0, "questions": 0}
        self.capacity, self.since = 0, time.perf_counter()

    def add(self, packed: Any) -> None:
        """Count a PackedBatch."""
        added = (packed.n_tokens, packed.n_labels, packed.n_images, packed.n_documents)
        for name, more in zip(self.counts, added, strict=True):
            self.counts[name] += more
        self.capacity += packed.input_ids.numel()

    def read(self, waited: float) -> dict[str, float]:
        """Rates since the last reading, `waited` seconds of which the device had no batch; and start again."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        values = {f"{name}_per_s": count / elapsed for name, count in self.counts.items()}
        values |= {"data_wait": waited / elapsed, "packing": self.counts["tokens"] / max(self.capacity, 1)}
        self.reset()
        return values


class StepStats:
    """Loss and gradient norm of the steps, added up on the device and read a logging interval later: nobody waits."""

    def __init__(self, device: torch.device, loss_sum: float = 0.0, labels: int = 0):
        self.loss_sum = torch.tensor(loss_sum, dtype=torch.float64, device=device)
        self.norm = torch.zeros((), dtype=torch.float64, device=device)
        self.bad_step = torch.zeros((), dtype=torch.float64, device=device)  # the first whose loss is not finite
        self.labels = labels

    def add(self, step: int, loss_sum: Tensor, labels: int, norm: Tensor | None = None) -> None:
        """Count a step: its summed loss, a scalar on the device, over so many labels; the norm of its gradient."""
        self.loss_sum += loss_sum
        self.labels += labels
        self.bad_step.copy_(torch.where(loss_sum.isfinite() | (self.bad_step > 0), self.bad_step, step))
        if norm is not None:
            self.norm.copy_(norm)

    def take(self) -> Callable[[], dict[str, float]]:
        """Start the copy to the host and start again; the result, called later, gives loss, grad_norm and bad_step."""
        labels, self.labels = max(self.labels, 1), 0
        values = torch.stack([self.loss_sum, self.norm, self.bad_step])
        host = torch.empty(3, dtype=values.dtype, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        there = torch.cuda.Event() if values.is_cuda else None
        if there:
            there.record()
        self.loss_sum.zero_()

        def read() -> dict[str, float]:
            if there:
                there.synchronize()
            loss_sum, norm, bad_step = host.tolist()
            return {"loss": loss_sum / labels, "grad_norm": norm, "bad_step": int(bad_step)}

        return read


class MetricsLog:
    """metrics.jsonl: one JSON object a line. Opening it at a step drops the lines after that step (a resume)."""

    def __init__(self, run: Path, step: int = 0):
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in read_metrics(run) if line["step"] <= step]
            temporary = run / ".metrics.jsonl"
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)
        self.file = self.path.open("a", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off by a crash is left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def summary_table(rows: dict[str, Any]) -> str:
    """Names and values in two aligned columns."""
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())
