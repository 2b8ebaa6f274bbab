"""The packed stream: source -> decode, augment, tokenise -> pack, in worker processes, resumable to the batch.

A run reads its source in one long sequence of *positions*: position p is place p % size of epoch p // size, and what
it holds (which example, which of its questions, how it is augmented) is a function of the seed and p. So where a stream
stands is a few integers (`batch.state`), and a run that resumes from them sees the batches that it would have seen.
Each worker packs its own share of the examples; batches come from the workers in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from nanovlm_fast.data.samples import SampleLoader, TooLong
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Budget, Packer

ENDLESS = 10**9  # epochs of a run that ends after --max-steps


@dataclass
class StreamBatch:
    """A packed batch and what the training loop must know about where it came from."""

    packed: PackedBatch
    bad: dict[int, str]  # examples that could not be read since the shard's last batch, and why
    too_long: list[str]  # examples that are over the budget, and why
    passed_over: int  # examples without a question that the curriculum asks
    left_out: int  # all of these, each as often as it was met
    curriculum: bool  # packed while the curriculum lasted
    state: dict[str, Any]  # of its shard, after this batch

    @property
    def consumed(self) -> int:
        """Examples of the epoch that are done with."""
        return self.packed.n_samples + self.left_out

    def pin_memory(self) -> StreamBatch:
        return replace(self, packed=self.packed.pin_memory())


@dataclass
class LeftOut:
    """What a shard met since its last batch and did not pack."""

    bad: dict[int, str] = field(default_factory=dict)
    too_long: list[str] = field(default_factory=list)
    passed_over: int = 0
    count: int = 0


class PackedStream(IterableDataset):
    """Packed batches of a whole run over a source, or this rank's of them.

    `states` holds one state a shard, see `initial_states`; all ranks together take so many `micro_batches` a step.
    """

    def __init__(
        self,
        load: SampleLoader,
        budget: Budget,
        states: list[dict[str, Any]],
        micro_batches: int | None = None,
    ):
        self.load, self.budget, self.states = load, budget, states
        train, size = load.train, len(load.source)
        self.endless = train.max_steps > 0
        self.total = (
            ENDLESS * size if train.max_steps else int(np.ceil(train.epochs * size))
        )  # examples in the run
        images = train.max_steps * (micro_batches or train.accumulate) * max(budget.images, 1)
        planned = images if train.max_steps else self.total
        self.curriculum_end = int(train.curriculum_share * planned) if train.curriculum else 0

    def __iter__(self) -> Iterator[StreamBatch]:
        worker = get_worker_info()
        if worker:
            yield from self.shard(self.states[worker.id])
            return
        shards = deque(self.shard(state) for state in self.states)
        while shards:  # in turn, as the workers are
            if (batch := next(shards[0], None)) is None:
                shards.popleft()
                continue
            yield batch
            shards.rotate(-1)

    def read(self, position: int, left: LeftOut) -> Sample | None:
        """The sample at a position; None for one that is left out, with the reason in `left`."""
        try:
            sample = self.load(position, position < self.curriculum_end)
            if not sample.documents:
                left.passed_over += 1
            elif misfit := self.budget.misfit(sample):
                raise TooLong(f"{sample.name}: {misfit}")
            else:
                return sample
        except TooLong as error:
            left.too_long.append(str(error))
        except ValueError as error:
            left.bad[self.load.index(position)] = str(error)
        left.count += 1
        return None

    def shard(self, state: dict[str, Any]) -> Iterator[StreamBatch]:
        """The batches of one shard, each with what was left out on the way to it.

        A run that ends after --max-steps would read for ever in a shard without anything to learn
        from: such a shard is at its end after a whole epoch, and one without examples at once.
        """
        model, look_ahead, size = self.load.model, self.load.train.look_ahead, len(self.load.source)
        if state["shard"] >= size:
            return
        packer, left = Packer(self.budget), LeftOut()
        packer.buffer = [sample for key in state["buffer"] if (sample := self.read(key, left))]
        position = state["position"]
        # up to here there was, or may have been, something to learn
        fruitful = max(position, self.curriculum_end)
        while True:
            # two epochs' positions hold one whole epoch, wherever they begin
            end = min(self.total, fruitful + 2 * size)
            while len(packer.buffer) < look_ahead and position < end:
                here, position = position, position + 1
                # an example stays with its worker, which remembers it
                if self.load.index(here) % state["shards"] != state["shard"]:
                    continue
                if sample := self.read(here, left):
                    packer.buffer.append(sample)
                    if sample.labels:
                        fruitful = max(fruitful, position)
                        end = min(self.total, fruitful + 2 * size)
                elif left.count - (left.passed_over if packer.buffer else 0) >= look_ahead:
                    break  # let the trainer know before reading on
            samples = packer.next()
            if not (samples or left.count):
                return
            packed = pack(samples, self.budget, model.image_tokens, model.vit_img_size)
            curriculum = bool(samples) and samples[0].key < self.curriculum_end
            after = {**state, "position": position, "buffer": packer.state_dict()}
            told = left.bad, left.too_long, left.passed_over, left.count
            yield StreamBatch(packed, *told, curriculum, after)
            left = LeftOut()
            if not self.endless:
                fruitful = max(fruitful, position)


def initial_states(shards: int) -> list[dict[str, Any]]:
    return [{"shard": i, "shards": shards, "position": 0, "buffer": []} for i in range(shards)]


def advance(states: list[dict[str, Any]], batch: StreamBatch) -> list[dict[str, Any]]:
    """The states to resume from once `batch` is used: the shard whose turn it is comes first."""
    used = next(i for i, state in enumerate(states) if state["shard"] == batch.state["shard"])
    return [*states[used + 1 :], *states[:used], batch.state]


def deal(states: list[dict[str, Any]], rank: int, ranks: int) -> list[dict[str, Any]]:
    """A rank's share of all shards' states. Raises ValueError if they cannot be dealt out evenly."""
    if len(states) % ranks:
        raise ValueError(
            f"the run reads its data in {len(states)} shards (processes x --workers when it was begun): "
            f"{ranks} processes cannot share them evenly"
        )
    return states[rank::ranks]


def undeal(shares: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The states of all shards from the ranks' shares: `deal` backwards."""
    return [state for turn in zip(*shares, strict=True) for state in turn]
