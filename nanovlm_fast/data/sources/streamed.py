"""A data set that is read in order, as it arrives: file by file, without a copy on this machine.

Where a reader stands is a `Place`, from which another one goes on with the next row: the state that
`datasets` keeps within a file, and how many rows of it were read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nanovlm_fast.data.images import printable
from nanovlm_fast.data.sources.cauldron import Cauldron, configurations, read_splits
from nanovlm_fast.data.sources.example import Example, LoaderError

# Attempts to go on with a file that cannot be read, and the seconds before the first; each further
# pause is twice as long. `huggingface_hub` repeats single requests before that
ATTEMPTS = 6
PAUSE = 1.0


class StreamLost(LoaderError):
    """A stream that could not be read on, whatever was tried."""


@dataclass(frozen=True)
class Place:
    """Where in a file a reader stands."""

    row: int = 0  # of the file: those before it were read
    state: dict[str, Any] | None = None  # what `datasets` keeps; None: the beginning


class StreamedRows:
    """The files of a data set of the schema that `kind` reads.

    Raises OSError if it cannot be reached, FileNotFoundError without such a split, ValueError
    without its columns.
    """

    def __init__(self, kind: type[Cauldron], data: str, split: str):
        self.data = data
        self.kind = kind
        self.parts = [
            (where, kind.rows_of(read_splits(name, config, streaming=True), split, where))
            for where, name, config in configurations(data)
        ]
        self.files = [
            (part, file)
            for part, (_, rows) in enumerate(self.parts)
            for file in range(rows.num_shards)
        ]

    def read(
        self, file: int, place: Place | None = None, before: int | None = None
    ) -> Iterator[tuple[Example | ValueError, Place]]:
        """The rows of a file from a place on, each with the place after it.

        A row is named by its file and its number there, or with `before`, the rows of the files
        before it, by its number among all: as where rows are read in any order.

        A row that is not of the schema comes as its ValueError: raised, it would end the generator.
        An interruption is tried again from the same row, with growing pauses; then it raises
        StreamLost.
        """
        place = place or Place()
        part, number = self.files[file]
        where, rows = self.parts[part]
        failed = 0
        while True:
            try:
                opened = rows.shard(num_shards=rows.num_shards, index=number)
                if place.state is not None:
                    opened.load_state_dict(place.state)
                # Not `for row in opened`, which deals the files out again in a loader's worker
                for row in opened.iter(1):
                    inside = f"{number}/{place.row}"
                    name = f"{where}/{inside if before is None else before + place.row}"
                    place = Place(place.row + 1, opened.state_dict())
                    failed = 0
                    yield self._example(name, row), place
                return
            except Exception as error:
                # As broad as that: `datasets` passes on the errors of requests, pyarrow and others
                reason = printable(" ".join(str(error).split()) or type(error).__name__)
                lost = f"--data {self.data}: {where}, file {number} after row {place.row}: {reason}"
                failed += 1
                if failed == ATTEMPTS:
                    goes_on = (
                        "--resume goes on from the last checkpoint, prepare from the last shard"
                    )
                    tried = f"{ATTEMPTS} attempts; {goes_on}"
                    raise StreamLost(f"{lost} ({tried})") from error
                pause = PAUSE * 2 ** (failed - 1)
                print(f"warning: {lost}; trying again in {pause:g} s", flush=True)
            time.sleep(pause)

    def _example(self, name: str, row: Any) -> Example | ValueError:
        (record,) = row.to_pylist()
        try:
            return self.kind.example_of(name, record, self.data)
        except ValueError as error:
            return error


def read_streaming(
    data: str, split: str, skip: int = 0, kind: type[Cauldron] = Cauldron
) -> Iterator[Example | ValueError]:
    """The rows of `kind(data, split)` after the first `skip`, in their order, as they arrive.

    A bad row comes as its ValueError: raised, it would end the generator.
    """
    rows = StreamedRows(kind, data, split)
    before: Counter[int] = Counter()  # rows of the part's files that were read
    for file, (part, _) in enumerate(rows.files):
        for row, _ in rows.read(file, before=before[part]):
            before[part] += 1
            if not skip:
                yield row
            skip = max(skip - 1, 0)
