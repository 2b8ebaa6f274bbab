"""The packed stream: source -> decode, augment, tokenise -> pack, in worker processes, resumable to the batch.

Everything is a function of (seed, epoch, index): the order of an epoch, the questions drawn for an image, its
augmentation. So a position in the stream is a few integers (`batch.state`), and a run that resumes from them sees the
batches that it would have seen. Each worker packs its own share of every epoch; batches come from the workers in turn.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.images import augment, load_image
from nanovlm_fast.data.sources import Source
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.packing import Budget, PackedBatch, Packer, Sample, pack

CACHE_BYTES = 2**30  # decoded images kept by each worker


class SampleLoader:
    """`loader(key)` -> `Sample` for a key (epoch, index); decoded images and token ids are kept for the next epoch."""

    def __init__(self, source: Source, model: VLMConfig, train: TrainConfig, text: TextProcessor):
        self.source, self.model, self.train, self.text = source, model, train, text
        self.cache: dict[int, Sample] = {}
        self.cache_room = CACHE_BYTES

    def __call__(self, key: tuple[int, int]) -> Sample:
        """Raises ValueError (BadImage, malformed record), naming the example, if it cannot be read."""
        epoch, index = key
        whole = self.cache.get(index) or self.load(index)
        rng = np.random.default_rng([self.train.seed, epoch, index])
        documents, wanted = whole.documents, self.train.questions_per_image
        if epoch < self.train.curriculum_epochs:
            documents = [document for document in documents if self.train.curriculum in document.question]
        if 0 < wanted < len(documents):
            documents = [documents[i] for i in rng.permutation(len(documents))[:wanted]]
        return Sample(whole.name, augment(whole.images, self.train.augment, rng), documents, key)

    def load(self, index: int) -> Sample:
        example = self.source[index]
        size = self.model.vit_img_size
        try:
            images = [load_image(image, size) for image in example.images]
        except ValueError as error:
            raise ValueError(f"{example.name}: {error}") from error
        stacked = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
        sample = Sample(example.name, stacked, self.text.documents(example.turns, len(images)))
        if stacked.nbytes <= self.cache_room:
            self.cache_room -= stacked.nbytes
            self.cache[index] = sample
        return sample


@dataclass
class StreamBatch:
    """A packed batch and what the training loop must know about where it came from."""

    packed: PackedBatch
    bad: dict[int, str]  # examples that could not be read since the shard's last batch, and why
    too_long: list[str]  # examples that are over the budget, and why
    passed_over: int  # examples without a question that the curriculum asks
    state: dict[str, Any]  # of its shard, after this batch

    @property
    def consumed(self) -> int:
        """Examples of the epoch that are done with."""
        return self.packed.n_samples + len(self.bad) + len(self.too_long) + self.passed_over


class PackedStream(IterableDataset):
    """Packed batches of `epochs` passes over a source. `states` holds one state a shard, see `loader`."""

    def __init__(self, load: SampleLoader, budget: Budget, epochs: float, states: list[dict[str, Any]]):
        self.load, self.budget, self.states = load, budget, states
        self.total = int(np.ceil(epochs * len(load.source)))  # examples in the whole run

    def keys(self, shard: int, shards: int, epoch: int, position: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, position, index) of the shard's examples from (epoch, position) on."""
        size = len(self.load.source)
        while epoch * size < self.total:
            order = np.random.default_rng([self.load.train.seed, epoch]).permutation(size)
            for place in range(position, min(size, self.total - epoch * size)):
                if place % shards == shard:
                    yield epoch, place, int(order[place])
            epoch, position = epoch + 1, 0

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

    def shard(self, state: dict[str, Any]) -> Iterator[StreamBatch]:
        model, look_ahead = self.load.model, self.load.train.look_ahead
        packer = Packer(self.budget)
        packer.load_state_dict(state["buffer"], self.load)
        epoch, position = state["epoch"], state["position"]
        keys = self.keys(state["shard"], state["shards"], epoch, position)
        while True:
            bad, too_long, passed_over = {}, [], 0
            while len(packer.buffer) < look_ahead and (key := next(keys, None)) is not None:
                epoch, position, index = key[0], key[1] + 1, key[2]
                try:
                    sample = self.load((epoch, index))
                except ValueError as error:
                    bad[index] = str(error)
                    continue
                if not sample.documents:
                    passed_over += 1
                elif misfit := packer.add(sample):
                    too_long.append(f"{sample.name}: {misfit}")
            samples = packer.next()
            if not (samples or bad or too_long or passed_over):
                return
            packed = pack(samples, self.budget, model.image_tokens, model.vit_img_size)
            after = {**state, "epoch": epoch, "position": position, "buffer": packer.state_dict()}
            yield StreamBatch(packed, bad, too_long, passed_over, after)


def initial_states(shards: int) -> list[dict[str, Any]]:
    return [{"shard": i, "shards": shards, "epoch": 0, "position": 0, "buffer": []} for i in range(shards)]


def advance(states: list[dict[str, Any]], batch: StreamBatch) -> list[dict[str, Any]]:
    """The states to resume from once `batch` is used: the shard whose turn it is comes first."""
    used = next(i for i, state in enumerate(states) if state["shard"] == batch.state["shard"])
    return [*states[used + 1 :], *states[:used], batch.state]


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
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, but only the trainer decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_is(batch: StreamBatch) -> StreamBatch:
    return batch


def measure_budget(load: SampleLoader, train: TrainConfig, probe: int = 1000) -> Budget:
    """The run's static sizes: what `train` gives, and for zeros what an even draw of the source needs.

    Raises ValueError for an empty source, or a token budget smaller than one sample.
    """
    if len(load.source) == 0:
        raise ValueError(f"--data {train.data}: the data set is empty")
    samples = []
    for index in np.unique(np.linspace(0, len(load.source) - 1, probe).astype(int)):
        try:
            samples.append(load((train.curriculum_epochs, int(index))))
        except ValueError:
            continue  # counted and named when the stream meets it
    measured = Budget.measure(samples, train.tokens_per_batch)
    return Budget(
        tokens=train.tokens_per_batch,
        documents=train.documents_per_batch or measured.documents,
        images=train.images_per_batch or measured.images,
        labels=train.labels_per_batch or measured.labels,
        max_seqlen=train.max_seqlen or measured.max_seqlen,
    )
