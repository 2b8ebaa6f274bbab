"""An example of a data set, and the interface of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from nanovlm_fast.data.text import Turn
from nanovlm_fast.packing.documents import Document


@dataclass
class Example:
    """Images as paths, bytes, arrays or PIL images, decoded later in a worker; turns are (question, answer)."""

    name: str
    images: Sequence[Any]
    turns: list[Turn]
    kind: str = ""  # what its answers are counted under in an evaluation
    documents: list[Document] | None = (
        None  # of prepared data (shards.py), whose images are (n, 3, H, W) uint8
    )

    def first(self) -> Example:
        """First image, first turn: what nanoVLM v0.1 takes of an example (--turns first)."""
        return replace(self, images=self.images[:1], turns=self.turns[:1])


class Source(Protocol):
    """A data set.

    One with its own way of being scored has `prompt`, `right(reply, answer)` and `reply_tokens` too.
    It may have `fingerprint`, which changes with its content, so that no run goes on with other
    data; and `pictures()`, without which each example is taken to have pictures of its own.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Subset:
    """The examples of `source` at `indices`, in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


def whole(source: Source) -> Source:
    """The data set that a subset is of."""
    return source.source if isinstance(source, Subset) else source
