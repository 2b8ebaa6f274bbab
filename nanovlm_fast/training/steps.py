"""One optimizer step: this rank's micro-batches, what all ranks agree on, and the gradients.

Each rank reads its own shards of the data. Before a step computes, the ranks sum a handful of
integers over gloo, from host to host, while the devices still compute the previous step: no rank
waits for its device, and all ranks end the data, or stop for a signal, at the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.samples import DROPPED
from nanovlm_fast.data.stream import StreamBatch, advance
from nanovlm_fast.model.masters import masters_of
from nanovlm_fast.model.scaling import LossScaler
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting.journal import Journal
from nanovlm_fast.reporting.metrics import Meter
from nanovlm_fast.runs import RunState
from nanovlm_fast.training.feed import Feed
from nanovlm_fast.training.parallel import reducing

# What `Taken` and the run's state count of images and labels: those there were, and room for them.
FILLED = ("images", "image_room", "labels", "label_room")


@dataclass
class Taken:
    """What the batches of a step took from the data."""

    examples: int = 0
    tokens: int = 0  # real ones
    capacity: int = 0  # tokens that the batches had room for
    filled: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FILLED, 0))
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPPED, 0))

    def add(self, batch: StreamBatch) -> None:
        self.examples += batch.consumed
        for reason, count in batch.dropped.items():
            self.dropped[reason] += count
        # While a curriculum lasts, images and not tokens limit a batch: its fill says nothing.
        if not batch.curriculum:
            self.tokens += batch.packed.n_tokens
            self.capacity += batch.packed.input_ids.numel()
            packed = batch.packed
            self.filled["images"] += packed.n_images
            self.filled["image_room"] += len(packed.images)
            self.filled["labels"] += packed.n_labels
            self.filled["label_room"] += len(packed.labels)


@dataclass
class StepData:
    """This rank's share of one optimizer step."""

    batches: list[PackedBatch] = field(default_factory=list)  # on the device
    taken: Taken = field(default_factory=Taken)


@dataclass(frozen=True)
class Agreement:
    """Sums over all ranks for one step."""

    n_labels: int  # 0: the data of every rank is exhausted
    pending_skips: int  # examples that were left out and are not named yet
    signals: int  # ranks that were asked to stop
    taken: Taken


def next_batches(
    feed: Feed, wanted: int, state: RunState, meter: Meter, journal: Journal
) -> StepData:
    """Take `wanted` micro-batches with labels from the feed; fewer once this rank's data ends."""
    step = StepData()
    while len(step.batches) < wanted:
        batch, on_device = next(feed, (None, None))
        if batch is None or on_device is None:
            break
        meter.add(batch.packed)
        # Advanced when a batch is used, not when a worker packs it: a resume must not lose the
        # batches that lie ready in the workers' queues.
        state.stream = advance(state.stream, batch)
        step.taken.add(batch)
        journal.note_left_out(batch)
        # A batch whose samples were all left out, or have no answer, cannot be trained on.
        if batch.packed.n_labels:
            step.batches.append(on_device)
    return step


def agree(world: World, step: StepData, pending_skips: int, signalled: bool) -> Agreement:
    """Sum over ranks what they must know before the step. All ranks must call it."""
    labels = sum(batch.n_labels for batch in step.batches)
    taken = step.taken
    sizes = [taken.examples, taken.tokens, taken.capacity]
    counts = [*taken.filled.values(), *taken.dropped.values()]
    sums = [int(value) for value in world.sum([labels, pending_skips, signalled, *sizes, *counts])]
    labels, skips, signals, examples, tokens, capacity, *counts = sums
    filled = dict(zip(FILLED, counts[: len(FILLED)], strict=True))
    dropped = dict(zip(DROPPED, counts[len(FILLED) :], strict=True))
    in_all = Taken(examples, tokens, capacity, filled, dropped)
    return Agreement(labels, skips, signals, in_all)


def fill_with_padding(
    step: StepData, wanted: int, budget: Budget, config: VLMConfig, device: torch.device
) -> None:
    """Append batches of padding until the step has `wanted`: other ranks still have data.

    Collectives need every rank. A rank whose own data is exhausted therefore computes on padding,
    which has no labels and thus no gradient, until the last rank is done.
    """
    while len(step.batches) < wanted:
        padding = pack([], budget, config.image_tokens, config.vit_img_size)
        step.batches.append(padding.to(device))


def accumulate_gradients(
    forward: Callable[[PackedBatch], Tensor],
    step_model: Callable[[PackedBatch], Tensor],
    batches: list[PackedBatch],
    labels_per_rank: float,
    autocast: Callable[[], AbstractContextManager],
    scaler: LossScaler | None = None,
) -> Tensor:
    """Forward and backward of every micro-batch; return the summed loss, a scalar on the device.

    `forward` gives the summed loss of a batch and runs `step_model`, the model in whatever form.
    Gradients are those of the mean over the labels of all micro-batches on all ranks, times the
    scale of the `scaler`, if there is one. Training and the benchmarks share this function, so that
    what is measured is what trains.
    """
    total = torch.zeros((), device=batches[0].input_ids.device)
    masters = masters_of(step_model)
    for number, batch in enumerate(batches, 1):
        # Gradients travel once per step, with the last micro-batch.
        with reducing(step_model, now=number == len(batches)):
            with autocast():
                loss_sum = forward(batch)
            # Ranks average their gradients, so each divides its sum by the mean count per rank:
            # the result is the mean over tokens. A mean of the batches' means would weigh tokens
            # unequally.
            loss = loss_sum / labels_per_rank
            (scaler.scale(loss) if scaler else loss).backward()
            # Sums over micro-batches are float32: bfloat16 would round every addition.
            if len(batches) > 1:
                masters.add_gradients()
        total += loss_sum.detach()
    return total
