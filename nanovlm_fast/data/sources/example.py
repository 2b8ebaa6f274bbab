"""`Example`, one record of a data set, and `Source`, the interface of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.same import Pictures
from nanovlm_fast.data.text import Grid, TextProcessor, Tokenizer, Turn
from nanovlm_fast.packing.documents import Document


class LoaderError(OSError):
    """An error that ends a run, raised where data is read."""

    def __init__(self, message: str):
        # A data loader makes the error anew in the parent, with the worker's traceback as message.
        # The last part of that is the original line
        super().__init__(message.rstrip().rsplit(f"{type(self).__name__}: ", 1)[-1])


@dataclass
class Example:
    """Images and turns of (question, answer).

    Images are paths, bytes, PIL images, or (3, H, W) uint8 arrays that are already resized. Files
    are decoded in a worker, so opening a data set costs no decoding.
    """

    name: str
    images: Sequence[Any]
    turns: list[Turn]
    kind: str = ""  # the category under which an evaluation counts its answers
    # By name, the rating of each turn or None: what a run drops turns by (--min-rating-...)
    ratings: dict[str, list[float | None]] = field(default_factory=dict)
    # Set for prepared data only (shards.py), whose `images` are one (n, 3, H, W) uint8 array
    documents: list[Document] | None = None
    grids: list[Grid] | None = None  # of its pictures, where that array is their tiles

    def first(self) -> Example:
        """First image, first turn: what nanoVLM v0.1 takes of an example (--turns first)."""
        ratings = {name: of_turns[:1] for name, of_turns in self.ratings.items()}
        grids = self.grids and self.grids[:1]
        images = self.images[: self._tiles_of_first() if grids else 1]
        return replace(self, images=images, turns=self.turns[:1], ratings=ratings, grids=grids)

    def _tiles_of_first(self) -> int:
        """Tiles of the first picture, where `images` are tiles."""
        each = [rows * columns for rows, columns in self.grids or ()]
        # More than the grids have: a tile of the whole goes before those of a picture that is cut
        whole = len(self.images) > sum(each)
        return each[0] + (whole and each[0] > 1)

    def keep(self, wanted: Sequence[int]) -> Example:
        """The example with these of its turns, by number."""
        ratings = {name: [each[i] for i in wanted] for name, each in self.ratings.items()}
        return replace(self, turns=[self.turns[i] for i in wanted], ratings=ratings)


@dataclass(frozen=True)
class Scoring:
    """How an evaluation asks the questions of a data set and judges the replies."""

    # With {question}; '': the model's own. Special tokens in it are special, except in ChatML
    prompt: str
    reply_tokens: int = 0  # tokens of a reply; 0: what the right answer takes
    right: Callable[[str, str], bool] = str.__eq__  # (stripped reply, stripped answer)


class Source(ABC):
    """A data set: `len(source)`, and `source[i]` -> `Example`. The rest is optional.

    `source[i]` raises ValueError, naming the record, if the record cannot be read. The run counts
    it and continues.
    """

    # How --data names the data set, for `registry.SOURCES`: "name", "name:ARGUMENT" or both
    FORMS: ClassVar[tuple[str, ...]] = ()
    # Whether the data is on the Hugging Face hub when --data gives no argument
    ON_HUB: ClassVar[bool] = False

    scoring: Scoring | None = None  # None: the model's prompt, and replies equal to the answer
    file: Path | None = None  # where the records are, named if there is none in it

    @classmethod
    def open(cls, split: str, argument: str) -> Source:
        """The `split` ('train' or 'test') of NAME or NAME:ARGUMENT; '' without an argument."""
        raise NotImplementedError(f"{cls.__name__} is not opened by name")

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    def turns_of(self, index: int) -> list[Turn]:
        """The turns of an example, for those who need no images. Raises what reading it does."""
        return self[index].turns

    @property
    def fingerprint(self) -> str | None:
        """Changes with the content, so that --resume refuses other data; None where unknown."""
        return None

    def pictures(self) -> Pictures | None:
        """Which examples show which pictures; None if each has pictures of its own."""
        return None

    def check(self, model: VLMConfig, text: TextProcessor, train: TrainConfig) -> None:
        """Raise ValueError if the data was processed for another model, or by other options."""
        return None

    def stored_tokenizer(self, lm_tokenizer: str) -> Tokenizer | None:
        """The tokenizer that the data was prepared with, if --lm-tokenizer was the same then."""
        return None


class Subset(Source):
    """The examples of `source` at `indices`, in that order.

    `scoring` is not taken over: a held-out part of the training data is asked with the prompt that
    the model is trained with.
    """

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]

    def turns_of(self, index: int) -> list[Turn]:
        return self.source.turns_of(int(self.indices[index]))

    def check(self, model: VLMConfig, text: TextProcessor, train: TrainConfig) -> None:
        self.source.check(model, text, train)

    def stored_tokenizer(self, lm_tokenizer: str) -> Tokenizer | None:
        return self.source.stored_tokenizer(lm_tokenizer)
