"""The packed stream: source -> decode, augment, tokenise -> pack, resumable to the exact batch.

A run reads its source in one long sequence of *positions*: position p is place p % size of epoch
p // size, and what it holds (which example, which of its questions, how it is augmented) is a
function of the seed and p. So the state of a stream is a few integers (`batch.state`), and a run
that resumes from them sees the batches that it would have seen.

A *shard* of the stream is what one worker reads and packs: shard i of n takes the examples whose
number is i modulo n. Batches are taken from the shards in turn. (The shards of prepared data, in
sources/shards.py, are files and have nothing to do with these.)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from nanovlm_fast.data.samples import SampleLoader, TooLong
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Budget, Packer

ENDLESS = 10**9  # epochs of a run that ends after --max-steps; more than any run reads


@dataclass
class StreamBatch:
    """A packed batch and what the training loop must know about where it came from."""

    packed: PackedBatch
    # Since the shard's last batch:
    # Examples that could not be read, and why. By number, or by reason where there are no numbers
    bad: dict[int | str, str]
    too_long: list[str]  # examples that are over the budget, and why
    passed_over: int  # examples without a question that the curriculum selects
    left_out: int  # all of these, each as often as it was met
    curriculum: bool  # whether it was packed while the curriculum lasted
    state: dict[str, Any]  # of its shard, after this batch
    # Turns and examples that the run's options drop, by `samples.DROPPED`, since the last batch too
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def consumed(self) -> int:
        """How many examples of the epoch this batch uses up."""
        return self.packed.n_samples + self.left_out

    def pin_memory(self) -> StreamBatch:
        return replace(self, packed=self.packed.pin_memory())


@dataclass
class LeftOut:
    """What a shard has met since its last batch and did not pack."""

    bad: dict[int | str, str] = field(default_factory=dict)
    too_long: list[str] = field(default_factory=list)
    passed_over: int = 0
    count: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class PackedStream(IterableDataset):
    """The packed batches of a whole run over a source, or one rank's share of them.

    `states` holds one state per shard, see `initial_states`. `micro_batches` is how many batches
    all ranks together use per step.
    """

    def __init__(
        self,
        load: SampleLoader,
        budget: Budget,
        states: list[dict[str, Any]],
        micro_batches: int | None = None,
    ):
        self.load = load
        self.budget = budget
        self.states = states
        train = load.train
        size = len(load.source)
        self.endless = train.max_steps > 0
        epochs = ENDLESS if self.endless else train.epochs
        self.total = int(np.ceil(epochs * size))  # examples in the run
        planned = self.total
        if self.endless:
            # How many examples the steps will use is not known before they are packed. The images
            # in full batches are an estimate that depends on the options and the budget alone, so a
            # resumed run ends its curriculum at the same position
            batches = train.max_steps * (micro_batches or train.accumulate)
            planned = batches * max(budget.images, 1)
        self.curriculum_end = int(train.curriculum_share * planned) if train.curriculum else 0

    def __iter__(self) -> Iterator[StreamBatch]:
        worker = get_worker_info()
        if worker:
            yield from self.shard(self.states[worker.id])
            return
        # Without workers the shards are read in turn, in the order in which a DataLoader takes
        # batches from its workers: --workers 0 must give the same batches
        shards = deque(self.shard(state) for state in self.states)
        while shards:
            batch = next(shards[0], None)
            if batch is None:
                shards.popleft()
                continue
            yield batch
            shards.rotate(-1)

    def read(self, position: int, left: LeftOut) -> Sample | None:
        """The sample at a position; None if it is left out, with the reason in `left`."""
        return self.admit(
            lambda: self.load(position, position < self.curriculum_end),
            left,
            lambda _: self.load.index(position),
        )

    def admit(
        self,
        make: Callable[[], Sample],
        left: LeftOut,
        key: Callable[[str], int | str],
    ) -> Sample | None:
        """The sample that `make` gives; None if it is left out, with the reason in `left`.

        `key` says under what an example that cannot be read is counted, given the reason.
        """
        try:
            sample = make()
            left.dropped.update(sample.dropped)
            if not sample.documents:
                left.passed_over += 1
            elif misfit := self.budget.misfit(sample):
                raise TooLong(f"{sample.name}: {misfit}")
            else:
                return sample
        except TooLong as error:  # before ValueError, which it is too
            left.too_long.append(str(error))
        except ValueError as error:
            left.bad[key(str(error))] = str(error)
        left.count += 1
        return None

    def shard(self, state: dict[str, Any]) -> Iterator[StreamBatch]:
        """The batches of one shard, each with what was left out on the way to it.

        In a run that ends after --max-steps, a shard without anything to learn from would be read
        without end. Such a shard ends after a whole epoch, and one without examples at once.
        """
        size = len(self.load.source)
        if state["shard"] >= size:
            return
        packer = Packer(self.budget)
        left = LeftOut()
        packer.buffer = [sample for key in state["buffer"] if (sample := self.read(key, left))]
        left.dropped.clear()  # counted when they were first read
        position = state["position"]
        # The last position up to which there was, or may have been, something to learn. A
        # curriculum may pass over whole epochs, so before its end nothing is concluded
        fruitful = max(position, self.curriculum_end)
        while True:
            position, fruitful = self.fill(packer, left, state, position, fruitful)
            samples = packer.next()
            if not (samples or left.count):
                return
            after = {**state, "position": position, "buffer": packer.state_dict()}
            # A batch without samples is yielded too, if it has examples to report
            yield self.batch(samples, left, after)
            left = LeftOut()
            if not self.endless:
                # A run over epochs ends anyway, and must report all that it leaves out
                fruitful = max(fruitful, position)

    def fill(
        self,
        packer: Packer,
        left: LeftOut,
        state: dict[str, Any],
        position: int,
        fruitful: int,
    ) -> tuple[int, int]:
        """Read into the packer's buffer from `position` on; returns (position, fruitful) after."""
        size = len(self.load.source)
        look_ahead = self.load.train.look_ahead
        # The positions of two epochs contain one whole epoch, wherever they begin
        end = min(self.total, fruitful + 2 * size)
        while len(packer.buffer) < look_ahead and position < end:
            here = position
            position += 1
            # By example and not by position: an example stays with its worker, which caches it
            if self.load.index(here) % state["shards"] != state["shard"]:
                continue
            if sample := self.read(here, left):
                packer.buffer.append(sample)
                if sample.labels:
                    fruitful = max(fruitful, position)
                    end = min(self.total, fruitful + 2 * size)
            elif left.count - (left.passed_over if packer.buffer else 0) >= look_ahead:
                # Let the trainer know before reading on: it stops the run at --max-bad-samples.
                # What a curriculum passes over is no fault, and ends the batch only if it is empty
                break
        return position, fruitful

    def batch(self, samples: list[Sample], left: LeftOut, after: dict[str, Any]) -> StreamBatch:
        model = self.load.model
        return StreamBatch(
            packed=pack(samples, self.budget, model.image_tokens, model.vit_img_size),
            bad=left.bad,
            too_long=left.too_long,
            passed_over=left.passed_over,
            left_out=left.count,
            dropped=dict(left.dropped),
            # The first sample is the oldest: the packer always takes it
            curriculum=bool(samples) and samples[0].key < self.curriculum_end,
            state=after,
        )


def initial_states(shards: int) -> list[dict[str, Any]]:
    """The states of all shards at the beginning of a run, as JSON can hold them."""
    return [{"shard": i, "shards": shards, "position": 0, "buffer": []} for i in range(shards)]


def advance(states: list[dict[str, Any]], batch: StreamBatch) -> list[dict[str, Any]]:
    """The states to resume from once `batch` is used: the shard whose turn is next comes first."""
    used = next(i for i, state in enumerate(states) if state["shard"] == batch.state["shard"])
    return [*states[used + 1 :], *states[:used], batch.state]


def deal(states: list[dict[str, Any]], rank: int, ranks: int) -> list[dict[str, Any]]:
    """One rank's share of the states of all shards.

    Raises ValueError if the shards cannot be divided evenly: the ranks would run out of data at
    different times.
    """
    if len(states) % ranks:
        raise ValueError(
            f"the run reads its data in {len(states)} shards (processes x --workers when it was "
            f"begun): {ranks} processes cannot share them evenly"
        )
    # Every `ranks`-th, so that the ranks' batches, taken in turn, follow the order of the shards
    return states[rank::ranks]


def undeal(shares: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The states of all shards from the ranks' shares: the inverse of `deal`."""
    return [state for turn in zip(*shares, strict=True) for state in turn]
