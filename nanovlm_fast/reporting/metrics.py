"""The numbers of a run: speed, losses and gradient norms, spikes, and metrics.jsonl."""

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
from nanovlm_fast.device import widest_float
from nanovlm_fast.files import write_whole
from nanovlm_fast.model.flops import step_flops
from nanovlm_fast.model.scaling import READINGS, LossScaler, state_of
from nanovlm_fast.packing.batch import PackedBatch
from nanovlm_fast.ranks import World

ALONE = World()


class Meter:
    """Counts between two log lines.

    Tokens are nanoVLM's: text and image tokens of real documents, never padding. Time is wall-clock
    time, waiting for data included. `peak` is the device's FLOP/s (`peak_flops`); with it there is
    an `mfu`, the share of it that model FLOPs took. `frozen` is passed on to `step_flops`.
    """

    def __init__(
        self, config: VLMConfig, peak: float | None = None, frozen: Collection[str] = ()
    ) -> None:
        self.config = config
        self.peak = peak
        self.frozen = frozen
        self.reset()

    def reset(self) -> None:
        """Start an interval."""
        self.counts = {"tokens": 0, "labels": 0, "images": 0, "questions": 0}
        self.flops = 0
        # Places for tokens, images and labels that the batches had.
        self.capacity = 0
        self.image_room = 0
        self.label_room = 0
        self.since = time.perf_counter()

    def add(self, packed: PackedBatch) -> None:
        """Count a batch."""
        self.counts["tokens"] += packed.n_tokens
        self.counts["labels"] += packed.n_labels
        self.counts["images"] += packed.n_images
        self.counts["questions"] += packed.n_documents
        if packed.n_labels:  # a batch without labels is not trained on
            self.flops += step_flops(
                self.config,
                packed.n_images,
                packed.n_tokens,
                packed.n_labels,
                packed.n_pairs,
                self.frozen,
            )
        self.capacity += packed.input_ids.numel()
        self.image_room += len(packed.images)
        self.label_room += len(packed.labels)

    def read(self, waited: float, world: World = ALONE) -> dict[str, float]:
        """Rates since the last reading; start a new interval.

        `waited` is the time in seconds for which the device had no batch. Counts are those of all
        ranks, which must all call it; waiting is the mean over ranks, `mfu` is of all devices.
        """
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        rooms = [self.capacity, self.image_room, self.label_room]
        mine = [*self.counts.values(), *rooms, self.flops, waited]
        *counts, capacity, image_room, label_room, flops, waited = world.sum(mine)
        values = {}
        for name, count in zip(self.counts, counts, strict=True):
            values[f"{name}_per_s"] = count / elapsed
        values["tflops_per_s"] = flops / elapsed / 1e12
        if self.peak:
            values["mfu"] = flops / elapsed / (self.peak * world.size)
        values["data_wait"] = waited / elapsed / world.size
        taken = dict(zip(self.counts, counts, strict=True))
        values["packing"] = taken["tokens"] / max(capacity, 1)
        # Data without images has no places for them, and none is empty.
        values["image_fill"] = taken["images"] / image_room if image_room else 1.0
        values["label_fill"] = taken["labels"] / label_room if label_room else 1.0
        self.reset()
        return values


class StepStats:
    """Losses and gradient norms of the steps of an interval.

    They stay on the device and are read a logging interval later, so that no step waits for them.
    Losses are summed over the ranks of `world`. `kept` is what `peek` gave as `kept` in the run
    that is resumed. `scaler` is that of a run in float16.

    Shapes: scalars (), on the device in the widest type that it has; `skipped` is (3,).
    """

    def __init__(
        self,
        device: torch.device,
        world: World = ALONE,
        kept: dict[str, Any] | None = None,
        scaler: LossScaler | None = None,
    ):
        self.device = torch.device(device)
        self.type = widest_float(self.device)
        self.world = world
        self.scaler = scaler
        kept = kept or {"losses": [], "labels": [], "skipped": [0, 0, 0]}
        # Kept losses are sums over ranks, and each rank adds its own when they are summed again.
        self.losses = [self._scalar(loss / self.world.size) for loss in kept["losses"]]
        self.labels: list[int] = list(kept["labels"])
        self.norm = self._scalar(0.0)
        # Skipped steps: in all, in a row until now, and most in a row since the last line.
        self.skipped = torch.tensor(kept["skipped"], dtype=self.type, device=device)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self.type, device=self.device)

    def add(self, loss_sum: Tensor, labels: int, norm: Tensor, skipped: Tensor) -> None:
        """Count a step: its summed loss on this rank, its labels on all ranks, its gradient norm.

        `skipped` is 1 if the update was skipped. All but `labels` are scalars on the device. With a
        scaler, gradients that overflowed are counted there and not here, and their norm is left
        out. All ranks must call it.
        """
        self.losses.append(loss_sum.to(self.type))
        self.labels.append(labels)
        if self.scaler:
            norm = self.norm.where(skipped > 0, norm.double())
            skipped = self.scaler.count(skipped, self._is_bad(loss_sum))
        self.norm.copy_(norm)
        # Arithmetic instead of an `if`, which would wait for the device.
        row = (self.skipped[1] + skipped) * skipped
        self.skipped = torch.stack(
            [self.skipped[0] + skipped, row, torch.maximum(self.skipped[2], row)]
        )

    def _is_bad(self, loss_sum: Tensor) -> Tensor:
        """1.0 on the device if the loss of any rank is not finite, else 0.0."""
        bad = (loss_sum - loss_sum).ne(0).float()
        if self.world.size > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return bad

    def take(self) -> Callable[[], dict[str, Any]]:
        """`peek`, and start a new interval."""
        read = self.peek()
        self.losses = []
        self.labels = []
        self.skipped[2].zero_()
        if self.scaler:
            self.scaler.begin_interval()
        return read

    def peek(self) -> Callable[[], dict[str, Any]]:
        """Begin the copy to the host; return a function that waits for it and gives the numbers.

        These are `loss` (mean over the steps where it is finite, None without any), `grad_norm`,
        `skipped` (in all), `skipped_in_a_row` (at most), `losses` (of each step, per labelled
        token), and `kept`, from which a resumed run continues; with a scaler also `loss_scale`, the
        same for it. All ranks must call it.
        """
        losses = torch.stack(self.losses) if self.losses else self.norm.new_zeros(0)
        if self.world.size > 1 and self.losses:
            dist.all_reduce(losses)
        scaling = self.scaler.readings() if self.scaler else losses.new_zeros(0)
        values = torch.cat([self.norm[None], self.skipped, scaling, losses])
        # Page-locked memory: a copy into any other would wait for the device.
        host = torch.empty(len(values), dtype=values.dtype, pin_memory=values.is_cuda)
        # Not from MPS, which has no event here to wait for.
        host.copy_(values, non_blocking=values.is_cuda)
        copied = torch.cuda.Event() if values.is_cuda else None
        if copied:
            copied.record()
        labels = list(self.labels)

        def read() -> dict[str, Any]:
            if copied:
                copied.synchronize()
            norm, skipped, row, worst, *rest = host.tolist()
            sums = rest[len(scaling) :]
            of_scaler = {"loss_scale": state_of(rest[:READINGS])} if self.scaler else {}
            return {
                **of_scaler,
                "loss": finite_mean(sums, labels),
                "grad_norm": norm,
                "skipped": int(skipped),
                "skipped_in_a_row": int(worst),
                "losses": [total / count for total, count in zip(sums, labels, strict=True)],
                "kept": {"losses": sums, "labels": labels, "skipped": [skipped, row, worst]},
            }

        return read


def finite_mean(sums: list[float], counts: list[int]) -> float | None:
    """Sum of the finite `sums` over the sum of their counts; None if none is finite.

    A single step that is not finite is skipped, and must not hide the others' loss.
    """
    total = 0.0
    count = 0
    for each, of in zip(sums, counts, strict=True):
        if math.isfinite(each):
            total += each
            count += of
    return total / count if count else None


class SpikeDetector:
    """Finds steps whose loss is over the running mean by more than `deviations` deviations.

    Mean and deviation have a memory of `memory` steps. Nothing is a spike in the first `after`
    steps, in which the loss falls fast.
    """

    def __init__(
        self,
        kept: list[float] | None = None,
        deviations: float = 6.0,
        memory: int = 100,
        after: int = 50,
    ):
        self.seen, self.mean, self.variance = kept or [0, 0.0, 0.0]
        self.deviations = deviations
        self.memory = memory
        self.after = after

    def observe(self, loss: float) -> bool:
        """Take in the loss of the next step; return whether it is a spike (or not finite)."""
        # Not taken in: the mean would be NaN from here on.
        if not math.isfinite(loss):
            return True
        limit = self.deviations * self.variance**0.5
        distance = loss - self.mean
        spike = self.seen >= self.after and distance > limit
        self.seen += 1
        weight = 1 / min(self.seen, self.memory)
        # A spike counts with the limit only, or it would raise the deviation and hide the next.
        if spike:
            distance = min(distance, limit)
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance**2)
        return spike

    def kept(self) -> list[float]:
        """What a resumed run's detector begins with."""
        return [self.seen, self.mean, self.variance]


class MetricsLog:
    """metrics.jsonl: one JSON object per line.

    Opening it at a step (a resume) drops the lines after that step, which the run writes again, and
    the scores of evaluations after step `evaluated`.
    """

    def __init__(self, run: Path, step: int = 0, evaluated: int = 0):
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = []
            for line in read_metrics(run):
                is_score = bool({"accuracy", "eval"} & line.keys())
                if line["step"] <= (min(step, evaluated) if is_score else step):
                    kept.append(line)
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        # By line, so that a killed run loses at most the line that it was writing.
        self.file = self.path.open("a", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        """Append a line."""
        self.file.write(json.dumps(values) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, up to the first that is damaged: a crash may cut off the last."""
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
