"""Training on a stream: rows that come in order are shuffled, packed, and resumed to the sample.

Each shard reads files of its own, in an order of its own for each epoch (or, if there are fewer
files than shards, every n-th row of all files). It shuffles blocks of --shuffle-buffer rows and
counts them: that count is the position of `stream.py`. Its state says where in the stream the
oldest block begins of which a sample still waits in the packer. A resumed run reads again from
there, decodes only what waits, and goes on: no row is lost or repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.same import digest_of, size_of_file
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.sources.streamed import Place, StreamedRows
from nanovlm_fast.data.split import TEXT, Split, differences, digest_of_text, misshapen
from nanovlm_fast.data.stream import LeftOut, PackedStream, StreamBatch
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Budget, Packer
from nanovlm_fast.ranks import World

# A batch is packed after so many times --look-ahead rows at the latest, were they all passed over
PASSES = 16
PROBE = 300  # examples at the beginning of a stream, on which the budgets are measured

Row = Example | ValueError


@dataclass(frozen=True)
class Begin:
    """Where in the stream of a shard a block begins; as JSON in the shard's state."""

    position: int = 0  # rows of the shard before it
    epoch: int = 0
    file: int = 0  # of the files that the shard reads in that epoch
    row: int = 0
    state: dict[str, Any] | None = None  # within the file


class ShuffledRows:
    """The rows of one shard from `begin` on, block by block: (position, row).

    `begins` holds where the blocks begin that were read and not forgotten, the last one current.
    """

    def __init__(self, rows: StreamedRows, train: TrainConfig, shard: int, shards: int):
        self.rows = rows
        self.train = train
        self.shard = shard
        self.shards = shards
        self.begins: deque[Begin] = deque()
        self.epoch = 0

    def __call__(self, begin: Begin) -> Iterator[tuple[int, Row]]:
        source = self.in_order(begin)
        while True:
            self.begins.append(begin)
            block = list(islice(source, self.train.shuffle_buffer))
            if not block:
                return
            rng = np.random.default_rng([self.train.seed, self.shard, begin.position])
            for place, number in enumerate(rng.permutation(len(block)).tolist()):
                yield begin.position + place, block[number][0]
            begin = block[-1][1]

    def in_order(self, begin: Begin) -> Iterator[tuple[Row, Begin]]:
        """Rows as they come, each with where the next one begins; ends if an epoch has none."""
        position = begin.position
        first = begin.file
        at = Place(begin.row, begin.state)
        for self.epoch in range(begin.epoch, 2**31):
            whole = first == 0 and at == Place()  # or what it had may have been read before
            before = position
            files = self.files(self.epoch)
            for number in range(first, len(files)):
                for row, after in self.rows.read(files[number], at):
                    if self.mine(after.row - 1):
                        position += 1
                        yield row, Begin(position, self.epoch, number, after.row, after.state)
                at = Place()
            if whole and position == before:
                return
            first = 0

    def files(self, epoch: int) -> list[int]:
        """The files that the shard reads, in the order of the epoch."""
        order = np.random.default_rng([self.train.seed, epoch]).permutation(len(self.rows.files))
        return order.tolist() if self.by_row else order[self.shard :: self.shards].tolist()

    @property
    def by_row(self) -> bool:
        """Whether the shards share every file, as there are too few for each to have its own."""
        return len(self.rows.files) < self.shards

    def mine(self, row: int) -> bool:
        return not self.by_row or row % self.shards == self.shard

    def oldest(self, needed: int) -> Begin:
        """Where the block begins that holds position `needed`; forgets those before it."""
        while len(self.begins) > 1 and self.begins[1].position <= needed:
            self.begins.popleft()
        return self.begins[0]


class HeldOut:
    """Recognises the examples that show a picture, or consist of a text, that is held out.

    `marks` are those of `split.py`: [size, digest] of a picture, [TEXT, digest] of a text.
    """

    def __init__(self, marks: list[list[Any]]):
        self.marks = {(size, digest) for size, digest in marks}
        self.sizes = {size for size, _ in marks}

    def shows(self, example: Example) -> bool:
        # By size first: most pictures have a size that no held-out one has, and are not read
        if not example.images:
            return TEXT in self.sizes and (TEXT, digest_of_text(example)) in self.marks
        same_size = [image for image in example.images if size_of(image) in self.sizes]
        return any(
            (size_of(image), digest_of(content_of(image))) in self.marks for image in same_size
        )


def size_of(image: Any) -> int:
    """Bytes of the file behind an image, -1 if it cannot be read: its sample will say so."""
    return len(image) or -1 if isinstance(image, bytes) else size_of_file(image)


def content_of(image: Any) -> bytes:
    """The file behind an image, empty if it cannot be read."""
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError:
        return b""


def marks_of(example: Example) -> list[list[Any]]:
    """What identifies the example's pictures, or the example if it has none.

    A picture that cannot be read is none: all such pictures would be the same one.
    """
    readable = [image for image in example.images if size_of(image) > 0]
    found = [[size_of(image), digest_of(content_of(image))] for image in readable]
    return found if example.images else [[TEXT, digest_of_text(example)]]


class StreamedStream(PackedStream):
    """The packed batches of a streamed data set, or one rank's share of them, without an end.

    The state of a shard has `begin` besides the position and the keys of what waits.
    """

    def __init__(
        self,
        rows: StreamedRows,
        load: SampleLoader,
        budget: Budget,
        states: list[dict[str, Any]],
        held_out: HeldOut,
    ):
        super().__init__(load, budget, states)
        self.rows = rows
        self.held_out = held_out

    def shard(self, state: dict[str, Any]) -> Iterator[StreamBatch]:
        """The batches of one shard. It ends if two epochs in a row had nothing to learn from."""
        rows = ShuffledRows(self.rows, self.load.train, state["shard"], state["shards"])
        begin = Begin(**state.get("begin", {}))
        rows.epoch = begin.epoch  # before the first row is read
        stream = rows(begin)
        packer = Packer(self.budget)
        left = LeftOut()
        packer.buffer = self.waiting(stream, state, left)
        left.dropped.clear()  # counted when they were first read
        position = state["position"]
        fruitful = rows.epoch
        while True:
            position = self.take_rows(stream, packer, left, state["shard"], position)
            if any(sample.labels for sample in packer.buffer):
                fruitful = rows.epoch
            samples = packer.next()
            if not (samples or left.count) or rows.epoch > fruitful + 1:
                return
            keys = packer.state_dict()
            oldest = dataclasses.asdict(rows.oldest(min([position, *keys])))
            after = {**state, "position": position, "buffer": keys, "begin": oldest}
            # A batch without samples is yielded too, if it has examples to report
            yield self.batch(samples, left, after)
            left = LeftOut()

    def waiting(
        self, stream: Iterator[tuple[int, Row]], state: dict[str, Any], left: LeftOut
    ) -> list[Sample]:
        """Read up to the position of the state, and again what waited in the packer then."""
        wanted = {*state["buffer"]}
        found: dict[int, Sample | None] = {}
        skipped = state["position"] - state.get("begin", {}).get("position", 0)
        for position, row in islice(stream, skipped):
            if position in wanted:
                found[position] = self.read_row(row, position, state["shard"], left)
        kept = (found.get(position) for position in state["buffer"])
        return [sample for sample in kept if sample]

    def take_rows(
        self,
        stream: Iterator[tuple[int, Row]],
        packer: Packer,
        left: LeftOut,
        shard: int,
        position: int,
    ) -> int:
        """Read rows into the packer's buffer; returns the position after them."""
        look_ahead = self.load.train.look_ahead
        # What ends this, apart from a full buffer, lets the trainer know before reading on, as in
        # `PackedStream.fill`. What is passed over counts too, or a stream without an end could
        # pass over all of it and never return
        while len(packer.buffer) < look_ahead and left.count < PASSES * look_ahead:
            here, row = next(stream, (position, None))
            if row is None:
                break
            position = here + 1
            if sample := self.read_row(row, here, shard, left):
                packer.buffer.append(sample)
            elif left.count - left.passed_over >= look_ahead:
                break
        return position

    def read_row(self, row: Row, position: int, shard: int, left: LeftOut) -> Sample | None:
        """A row as a sample; None if it is left out, with the reason in `left`."""

        def make() -> Sample:
            if isinstance(row, ValueError):
                raise row
            if self.held_out.shows(row):
                return Sample(row.name, np.zeros(0), [], dropped=("held_out",))
            return self.load.drawn(self.load.build(row), position, shard=shard)

        return self.admit(make, left, lambda reason: reason)


class Listed(Source):
    """Examples that lie in memory."""

    def __init__(self, examples: list[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def split_stream(
    rows: StreamedRows, config: TrainConfig, world: World, state: dict[str, Any] | None
) -> Split:
    """Hold out the pictures of the first --val-samples examples, wherever else they are shown.

    `train` of the result is the beginning of the rest, to measure on. Raises ValueError if the
    stream is empty, if the ranks see different data, or if it does not begin as it did when the
    checkpoint was written. --data-changed accepts the latter: what was held out stays so, and is
    scored as far as it is found again at the beginning.
    """
    examples = first_examples(rows, config.val_samples + PROBE)
    held_out = examples[: min(config.val_samples, len(examples) // 2)]
    found = [mark for example in held_out for mark in marks_of(example)]
    marks = [list(mark) for mark in dict.fromkeys(map(tuple, found))]
    record = record_of(examples, marks)
    if len({*world.gather(record["fingerprint"])}) > 1:
        raise ValueError(f"--data {config.data}: the processes see different data")
    count = f"its first {len(held_out):,} examples"
    lines: list[str] = []
    kept = (state or {}).get("data")
    if kept is not None and (wrong := misshapen(kept)):
        raise ValueError(f"--resume: state.json is damaged: its data, {wrong}")
    if kept is not None and differences(kept, record):
        # It has changed now, or before the checkpoint: then this is what that recorded
        record = record_of(examples, kept["marks"])
        known = HeldOut(kept["marks"])
        held_out = [example for example in examples if known.shows(example)]
        count = f"{len(held_out):,} of its first {len(examples):,} examples, found again"
        if changes := differences(kept, record):
            if not config.data_changed:
                changed = f"--data {config.data} does not begin as it did: {changes}"
                raise ValueError(
                    f"{changed}. --data-changed reads it from its beginning, --out begins a new run"
                )
            lines.append(f"--data-changed: {changes}; what was held out stays so")
    known = HeldOut(record["marks"])
    scored = {id(example) for example in held_out}
    rest = [
        example for example in examples if id(example) not in scored and not known.shows(example)
    ]
    if not rest:
        none = "no example in the stream that could be read and is not held out"
        raise ValueError(f"--data {config.data}: {none}")
    line = f"training on a stream of {len(rows.files):,} files, held out: {count}"
    return Split(Listed(rest), Listed(held_out), record, [*lines, line], rows)


def record_of(examples: list[Example], marks: list[list[Any]]) -> dict[str, Any]:
    """What a checkpoint keeps of a stream: how it begins, and what is held out of it."""
    said = repr([example.turns for example in examples]).encode(errors="replace")
    fingerprint = hashlib.sha256(said + repr(marks).encode()).hexdigest()
    return {"fingerprint": fingerprint, "examples": 0, "held_out": [], "marks": marks}


def first_examples(rows: StreamedRows, count: int) -> list[Example]:
    """The first examples of a stream, in the order of its files; unreadable rows are left out."""
    every = (row for file in range(len(rows.files)) for row, _ in rows.read(file))
    return list(islice((row for row in every if isinstance(row, Example)), count))
