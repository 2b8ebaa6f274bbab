"""`Document` and `Sample`: what the packer packs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORE = -100  # a label without loss; also the default `ignore_index` of torch's cross-entropy


@dataclass
class Document:
    """n positions that attend to each other, causally, and to nothing else."""

    input_ids: np.ndarray  # (n,) int64, a placeholder under image tokens
    image_rows: np.ndarray  # (n,) int32, rows of the sample's own image tokens, -1 for text
    # (n,) int64, next-token targets, IGNORE where there is no loss. They are already shifted by
    # one: labels[i] is what follows position i
    labels: np.ndarray
    question: str = ""  # for messages, and for a curriculum to select by

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Sample:
    """Documents that share `images`, (n, 3, H, W) uint8."""

    name: str  # for messages
    images: np.ndarray
    documents: list[Document]
    key: int = 0  # its position in the stream, from which a resumed run reads it again
    # (rows, columns) of each picture's tiles, where `images` are tiles
    grids: tuple[tuple[int, int], ...] = ()
    dropped: tuple[str, ...] = ()  # why turns of the example were dropped, one reason for each

    # Cached: the packer compares the sizes of every buffered sample for every batch
    @cached_property
    def tokens(self) -> int:
        return sum(len(document) for document in self.documents)

    @cached_property
    def labels(self) -> int:
        return sum(int((document.labels != IGNORE).sum()) for document in self.documents)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Its share of a budget: tokens, documents, images, labels."""
        return self.tokens, len(self.documents), len(self.images), self.labels
