"""The packed stream: source -> decode, augment, tokenise -> pack, in worker processes, resumable to the batch.

A run reads its source in one long sequence of *positions*: position p is place p % size of epoch p // size, and what
it holds (which example, which of its questions, how it is augmented) is a function of the seed and p. So where a stream
stands is a few integers (`batch.state`), and a run that resumes from them sees the batches that it would have seen.
Each worker packs its own share of the examples; batches come from the workers in turn.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.images import augment, load_image
from nanovlm_fast.data.shards import Prepared
from nanovlm_fast.data.sources import Example, Source, whole
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.packing import IGNORE, Budget, PackedBatch, Packer, Sample, pack

CACHE_BYTES = 2**30  # decoded examples kept by each worker
AHEAD = 3  # batches that the host may be ahead of the device
ENDLESS = 10**9  # epochs of a run that ends after --max-steps
PARENT_SECONDS = 0.5  # between a worker's looks for its parent


class TooLong(ValueError):
    """An example that can be read but has no room in the model or the budgets.

    The message names it, and the option.
    """


def make_sample(example: Example, image_size: int, text: TextProcessor) -> Sample:
    """Decode, resize and tokenise. Raises ValueError naming the example if an image cannot be read."""
    example = example.first() if text.mode == "first" else example
    try:
        images = [load_image(image, image_size) for image in example.images]
        documents = text.documents(example.turns, len(images))
    except ValueError as error:
        raise ValueError(f"{example.name}: {error}") from error
    stacked = np.stack(images) if images else np.zeros((0, 3, image_size, image_size), np.uint8)
    return Sample(example.name, stacked, documents)


class SampleLoader:
    """Examples of a source as samples; decoded images and token ids are kept for the next epoch."""

    def __init__(self, source: Source, model: VLMConfig, train: TrainConfig, text: TextProcessor):
        if isinstance(prepared := whole(source), Prepared):
            prepared.check(model.vit_img_size, text)
        self.source, self.model, self.train, self.text = source, model, train, text
        self.cache: dict[int, Sample] = {}
        self.cache_room = CACHE_BYTES
        self.orders: dict[int, np.ndarray] = {}  # of the last two epochs

    def order(self, epoch: int) -> np.ndarray:
        """(examples,) a permutation: the order of an epoch."""
        if epoch not in self.orders:
            while len(self.orders) > 1:
                del self.orders[min(self.orders)]
            self.orders[epoch] = np.random.default_rng([self.train.seed, epoch]).permutation(len(self.source))
        return self.orders[epoch]

    def index(self, position: int) -> int:
        """The example that `position` holds."""
        epoch, place = divmod(position, len(self.source))
        return int(self.order(epoch)[place])

    def __call__(self, position: int, curriculum: bool = False) -> Sample:
        """The sample at a position; under a curriculum only with the questions that it asks, which may be none.

        Raises ValueError (BadImage, malformed record), naming the example, if it cannot be read.
        """
        index = self.index(position)
        whole = self.cache.get(index) or self.load(index)
        rng = np.random.default_rng([self.train.seed, position])
        documents, wanted = whole.documents, self.train.questions_per_image
        if curriculum:
            documents = [document for document in documents if self.train.curriculum in document.question]
        if 0 < wanted < len(documents):
            documents = [documents[i] for i in rng.permutation(len(documents))[:wanted]]
        return Sample(whole.name, augment(whole.images, self.train.augment, rng), documents, position)

    def load(self, index: int) -> Sample:
        example = self.source[index]
        if example.documents is not None:  # prepared: nothing that a cache could save
            return Sample(example.name, example.images, example.documents)
        limit, count = self.model.lm_max_position_embeddings, len(example.images)
        if self.text.mode == "first":
            count = min(count, 1)
        # before they are decoded: thousands would fill the memory
        if count * self.model.image_tokens > limit:
            taken = f"{count} images take {count * self.model.image_tokens} tokens"
            raise TooLong(f"{example.name}: {taken}, --lm-max-position-embeddings is {limit}")
        sample = make_sample(example, self.model.vit_img_size, self.text)
        needed = sample.images.nbytes + 20 * sample.tokens  # ids, rows and labels of a token
        if needed <= self.cache_room:
            self.cache_room -= needed
            self.cache[index] = sample
        return sample


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
        self, load: SampleLoader, budget: Budget, states: list[dict[str, Any]], micro_batches: int | None = None
    ):
        self.load, self.budget, self.states = load, budget, states
        train, size = load.train, len(load.source)
        self.endless = train.max_steps > 0
        self.total = ENDLESS * size if train.max_steps else int(np.ceil(train.epochs * size))  # examples in the run
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


def batches_of(stream: PackedStream, pin_memory: bool = False, lives: int = 3) -> Iterator[StreamBatch]:
    """The stream's batches; workers that die are replaced, `lives` times in a run, and no batch is lost or repeated.

    Raises OSError when they die more often. Batches before are not affected.
    """
    while True:
        try:
            iterator = iter(loader(stream, pin_memory))
            # torch's handler raises wherever the main thread is when a worker dies, in the middle of a step perhaps;
            # without it the loader finds out when it next waits for that worker
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for batch in iterator:
                yield batch
                stream.states = advance(stream.states, batch)
            return
        except (RuntimeError, EOFError, ConnectionError) as error:  # the latter: a batch that it was handing over
            died = any(what in str(error) for what in ("DataLoader worker", "Pin memory thread"))
            if isinstance(error, RuntimeError) and not died:
                raise
            lives -= 1
            if lives < 0:
                raise OSError(f"loader workers die again and again, the last: {error}") from error
            print(
                f"warning: {str(error) or 'a loader worker died over a batch'}; new workers go on from the same batch"
            )


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
        worker_init_fn=begin_worker,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )


class Feed:
    """Batches of a loader on the device: copied on a stream of their own, while the step before still computes.

    Iterating gives each batch as it came, and its packed batch on the device; with `trim` that is without its padding.
    """

    def __init__(self, batches: Iterator[StreamBatch], device: torch.device, trim: bool = False):
        self.batches, self.device, self.trim = batches, device, trim
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.seconds = 0.0
        self.marks: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # the device needed it; it was there

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
        if len(self.marks) > AHEAD:  # or the batches of many steps would lie on the device before the first is done
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


def begin_worker(worker: int) -> None:
    """What each process of a data loader does first."""
    leave_signals_to_the_parent()
    threading.Thread(target=end_with_the_parent, daemon=True, name="parent").start()


def end_with_the_parent() -> None:
    """Wait until the parent is gone, killed perhaps, and end this process, whatever it is doing.

    The loader itself looks for its parent only between two batches. (PR_SET_PDEATHSIG would come
    when the thread that started the worker ends, and not only with its process.)
    """
    parent = multiprocessing.parent_process()
    while os.getppid() == parent.pid:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def leave_signals_to_the_parent() -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group, but only the parent decides what they mean."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)  # a worker ends when the loader says so, or when its parent is gone


@atexit.register
def _end_workers() -> None:
    """Whoever exits without having closed a loader would wait without end for workers that ignore SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _as_is(batch: StreamBatch) -> StreamBatch:
    return batch


def even_draw(load: SampleLoader, count: int = 1000) -> list[Sample]:
    """`count` samples evenly over the first epoch.

    Raises ValueError, with a first reason, if none can be used.
    """
    samples, first = [], None
    for position in np.unique(np.linspace(0, max(len(load.source) - 1, 0), count).astype(int)):
        try:
            samples.append(load(int(position)))
        except ValueError as error:  # counted and named when the stream meets it
            first = first or error
    if not samples and first:
        what = "fits" if isinstance(first, TooLong) else "could be read"
        raise ValueError(f"--data {load.train.data}: no example {what}. The first: {first}")
    return samples


def check_memory(budget: Budget, image_size: int) -> None:
    """Raise ValueError if this machine cannot hold one batch of the budget."""
    # ids, positions and image rows of a token, place and id of a label: 16 bytes each
    needed = 3 * budget.images * image_size**2 + 16 * (budget.tokens + budget.labels)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"--tokens-per-batch {budget.tokens} with {budget.images} images takes "
            f"{needed / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f}: take fewer"
        )


def measure_budget(load: SampleLoader, train: TrainConfig, probe: int = 1000) -> Budget:
    """The run's static sizes: what `train` gives, and for zeros what an even draw of the source needs.

    Raises ValueError, with a first reason, if nothing of the draw can be read, fits, or carries a label.
    """
    limit = load.model.lm_max_position_embeddings
    nothing = f"--data {train.data}: no example fits the budgets. The first:"
    if train.max_seqlen > limit:
        raise ValueError(f"--max-seqlen {train.max_seqlen} is over the model's --lm-max-position-embeddings {limit}")
    samples = even_draw(load, probe)
    room = train.max_seqlen or limit
    # what is left out takes no part of a batch
    fitting = [sample for sample in samples if all(len(document) <= room for document in sample.documents)]
    if samples and not fitting:
        longest = max(len(document) for document in samples[0].documents)
        option = f"--{'max-seqlen' if train.max_seqlen else 'lm-max-position-embeddings'} is {room}"
        document = f"{longest} tokens in one document"
        raise ValueError(f"{nothing} {samples[0].name}: {document}, {option}")
    measured = Budget.measure(fitting, train.tokens_per_batch, longest=room)
    budget = Budget(
        tokens=train.tokens_per_batch,
        documents=train.documents_per_batch or measured.documents,
        images=train.images_per_batch or measured.images,
        labels=train.labels_per_batch or measured.labels,
        max_seqlen=train.max_seqlen or measured.max_seqlen,
    )
    check_memory(budget, load.model.vit_img_size)
    misfits = [f"{sample.name}: {misfit}" for sample in samples if (misfit := budget.misfit(sample))]
    if len(misfits) == len(samples):
        raise ValueError(f"{nothing} {misfits[0]}")
    if not any((document.labels != IGNORE).any() for sample in samples for document in sample.documents):
        raise ValueError(f"--data {train.data}: no answer in any example, there is nothing to learn")
    return budget
