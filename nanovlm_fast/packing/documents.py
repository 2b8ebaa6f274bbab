"""Documents and samples: what is packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORE = -100


@dataclass
class Document:
    """n positions: token ids (a placeholder under image tokens), image rows (-1 for text), next-token targets."""

    input_ids: np.ndarray  # (n,) int64
    image_rows: np.ndarray  # (n,) int32, rows of the sample's own image tokens
    labels: np.ndarray  # (n,) int64, -100 where there is no loss
    question: str = ""  # what it asks, for people and for a curriculum

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Sample:
    """Documents that share `images` (n, 3, H, W) uint8."""

    name: str  # for people
    images: np.ndarray
    documents: list[Document]
    key: int = 0  # its position in the stream, which finds it again

    @cached_property
    def tokens(self) -> int:
        return sum(len(document) for document in self.documents)

    @cached_property
    def labels(self) -> int:
        return sum(int((document.labels != IGNORE).sum()) for document in self.documents)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What it takes of a budget: tokens, documents, images, labels."""
        return self.tokens, len(self.documents), len(self.images), self.labels
