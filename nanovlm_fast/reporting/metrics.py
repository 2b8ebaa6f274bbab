"""What a run reports: speed as the field counts it, and the log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.files import write_whole
from nanovlm_fast.model.flops import step_flops
from nanovlm_fast.ranks import World

ALONE = World()


class Meter:
    """Counts between two log lines. Tokens are nanoVLM's: text and image tokens of real documents, never padding.

    Time is wall-clock with the wait for data in it; `wait` is that share. `peak` is the device's FLOP/s (`peak_flops`);
    with it there is an `mfu`, the share of it that model FLOPs took (`step_flops`; `frozen` as there).
    """

    def __init__(
        self, config: VLMConfig, peak: float | None = None, frozen: Collection[str] = ()
    ) -> None:
        self.config, self.peak, self.frozen = config, peak, frozen
        self.reset()

    def reset(self) -> None:
        self.counts = {"tokens": 0, "labels": 0, "images": 0, "questions": 0}
        self.flops, self.capacity, self.since = 0, 0, time.perf_counter()

    def add(self, packed: Any) -> None:
        """Count a PackedBatch."""
        added = (packed.n_tokens, packed.n_labels, packed.n_images, packed.n_documents)
        for name, more in zip(self.counts, added, strict=True):
            self.counts[name] += more
        if packed.n_labels:  # a batch without them is not trained on
            sizes = packed.n_images, packed.n_tokens, packed.n_labels, packed.n_pairs
            self.flops += step_flops(self.config, *sizes, self.frozen)
        self.capacity += packed.input_ids.numel()

    def read(self, waited: float, world: World = ALONE) -> dict[str, float]:
        """Rates since the last reading, `waited` seconds of which the device had no batch; and start again.

        Counts are of all ranks of `world`, which must all call it; waiting is the mean rank's, `mfu` of all devices.
        """
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        *counts, flops, capacity, waited = world.sum(
            [*self.counts.values(), self.flops, self.capacity, waited]
        )
        values = {
            f"{name}_per_s": count / elapsed
            for name, count in zip(self.counts, counts, strict=True)
        }
        values["tflops_per_s"] = flops / elapsed / 1e12
        if self.peak:
            values["mfu"] = flops / elapsed / (self.peak * world.size)
        values |= {
            "data_wait": waited / elapsed / world.size,
            "packing": counts[0] / max(capacity, 1),
        }
        self.reset()
        return values


class StepStats:
    """Losses and gradient norms of the steps, kept on the device and read a logging interval later: nobody waits.

    `world` is where the losses are summed over ranks. `kept` is what `snapshot` gave, of the run that is resumed.
    """

    def __init__(
        self, device: torch.device, world: World = ALONE, kept: dict[str, Any] | None = None
    ):
        self.device, self.world = device, world
        kept = kept or {"losses": [], "labels": [], "skipped": [0, 0, 0]}
        self.losses = [self._scalar(loss / self.world.size) for loss in kept["losses"]]
        self.labels: list[int] = list(kept["labels"])
        self.norm = self._scalar(0.0)
        # steps skipped in all, in a row until now, and in a row at most since the last line
        self.skipped = torch.tensor(kept["skipped"], dtype=torch.float64, device=device)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def add(self, loss_sum: Tensor, labels: int, norm: Tensor, skipped: Tensor) -> None:
        """Count a step: its summed loss on this rank, over so many labels on all; the norm of its gradient.

        `skipped` is 1 where it was skipped; all of these but `labels` are scalars on the device.
        """
        self.losses.append(loss_sum.double())
        self.labels.append(labels)
        self.norm.copy_(norm)
        row = (self.skipped[1] + skipped) * skipped
        self.skipped = torch.stack(
            [self.skipped[0] + skipped, row, torch.maximum(self.skipped[2], row)]
        )

    def take(self) -> Callable[[], dict[str, Any]]:
        """`peek`, and start again."""
        read = self.peek()
        self.losses, self.labels = [], []
        self.skipped[2].zero_()
        return read

    def peek(self) -> Callable[[], dict[str, Any]]:
        """Start the copy to the host; the result, called later, gives the interval's numbers. All ranks must call it.

        `loss` (of the steps where it is finite; None without any), `grad_norm`, `skipped` (in all),
        `skipped_in_a_row` (at most), `losses` (of each step, a labelled token), and `kept`, to go on from.
        """
        losses = torch.stack(self.losses) if self.losses else self.norm.new_zeros(0)
        if self.world.size > 1 and self.losses:
            dist.all_reduce(losses)
        values = torch.cat([self.norm[None], self.skipped, losses])
        host = torch.empty(len(values), dtype=values.dtype, pin_memory=values.is_cuda).copy_(
            values, non_blocking=True
        )
        there = torch.cuda.Event() if values.is_cuda else None
        if there:
            there.record()
        labels = list(self.labels)

        def read() -> dict[str, Any]:
            if there:
                there.synchronize()
            norm, skipped, row, worst, *sums = host.tolist()
            finite = [
                (total, count)
                for total, count in zip(sums, labels, strict=True)
                if math.isfinite(total)
            ]
            return {
                "loss": sum(total for total, _ in finite) / sum(n for _, n in finite)
                if finite
                else None,
                "grad_norm": norm,
                "skipped": int(skipped),
                "skipped_in_a_row": int(worst),
                "losses": [total / count for total, count in zip(sums, labels, strict=True)],
                "kept": {"losses": sums, "labels": labels, "skipped": [skipped, row, worst]},
            }

        return read


class SpikeDetector:
    """Finds steps whose loss stands out: over the running mean by more than `deviations` running deviations."""

    def __init__(
        self,
        kept: list[float] | None = None,
        deviations: float = 6.0,
        memory: int = 100,
        after: int = 50,
    ):
        self.seen, self.mean, self.variance = kept or [0, 0.0, 0.0]
        self.deviations, self.memory, self.after = deviations, memory, after

    def observe(self, loss: float) -> bool:
        """Take in the next step's loss, and say whether it is one; what is not finite counts as one."""
        if not math.isfinite(loss):
            return True
        distance = loss - self.mean
        spike = self.seen >= self.after and distance > self.deviations * self.variance**0.5
        self.seen += 1
        weight = 1 / min(self.seen, self.memory)
        distance = (
            min(distance, self.deviations * self.variance**0.5) if spike else distance
        )  # or it would hide the next
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance**2)
        return spike

    def kept(self) -> list[float]:
        return [self.seen, self.mean, self.variance]


class MetricsLog:
    """metrics.jsonl: one JSON object a line.

    Opening it at a step (a resume) drops the lines after that step, and the scores of evaluations after `evaluated`.
    """

    def __init__(self, run: Path, step: int = 0, evaluated: int = 0):
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in read_metrics(run) if line["step"] <= step]
            kept = [
                line
                for line in lines
                if line["step"] <= evaluated or not {"accuracy", "eval"} & line.keys()
            ]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off by a crash is left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_bytes().split(b"\n"):
        try:
            values = json.loads(line.decode())
            if not isinstance(values["step"], int):
                break
        except (ValueError, RecursionError, KeyError, TypeError):
            break
        lines.append(values)
    return lines


def summary_table(rows: dict[str, Any]) -> str:
    """Names and values in two aligned columns."""
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())
