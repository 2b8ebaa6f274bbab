"""Samples -> `PackedBatch`: documents laid end to end in static shapes. Pure CPU, no model.

A *document* is what one attention block sees: image tokens and text. A *sample* is a group of documents that share
images, so an image with ten questions is encoded once and gathered ten times. The packer fills one batch at a time,
best fit over a look-ahead buffer, and never splits or mixes anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

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


@dataclass
class PackedBatch:
    """T tokens, D documents, N images and L labels, all of them fixed sizes of the run (see `Budget`)."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int32, from 0 in every document
    cu_seqlens: Tensor  # (D + 1,) int32
    images: Tensor  # (N, 3, H, W) uint8
    image_rows: Tensor  # (T,) int32, row of the projected image tokens, -1 for text
    label_index: Tensor  # (L,) int64, positions that carry loss
    labels: Tensor  # (L,) int64, their targets, padded with -100
    max_seqlen: int
    n_tokens: int = 0  # real ones, without padding
    n_images: int = 0
    n_documents: int = 0
    n_labels: int = 0
    n_samples: int = 0
    n_pairs: int = 0  # queries and keys that the causal mask lets meet, n (n + 1) / 2 a document of n
    names: tuple[str, ...] = ()

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PackedBatch(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})

    def to(self, device: torch.device | str) -> PackedBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """In page-locked memory, from where a copy to the device need not be waited for."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until what `stream` was given so far is done with it (CUDA)."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def trimmed(self) -> PackedBatch:
        """The same batch without its padding: less work where shapes may vary from step to step (eager)."""
        sizes = (
            (self.n_tokens, ("input_ids", "position_ids", "image_rows")),
            (self.n_documents + 1, ("cu_seqlens",)),
            (self.n_images, ("images",)),
            (self.n_labels, ("label_index", "labels")),
        )
        cut = {name: getattr(self, name)[:size] for size, names in sizes for name in names}
        longest = int(cut["cu_seqlens"].diff().max()) if self.n_documents else 0
        return dataclasses.replace(self, **cut, max_seqlen=longest)


@dataclass(frozen=True)
class Budget:
    """Static sizes of a packed batch. `documents` counts padding documents too."""

    tokens: int
    documents: int
    images: int
    labels: int
    max_seqlen: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < (0 if field.name in ("images", "labels") else 1):
                raise ValueError(f"budget {field.name} = {getattr(self, field.name)} is too small for any sample")
        if self.documents < self.pad_documents(self.tokens):
            raise ValueError(
                f"budget of {self.documents} documents (--documents-per-batch): {self.tokens} "
                f"tokens need at least {self.pad_documents(self.tokens)} documents of max_seqlen "
                f"{self.max_seqlen} (--max-seqlen)"
            )

    def pad_documents(self, padding: int) -> int:
        """Documents that unused positions are cut into: none may be longer than max_seqlen."""
        return -(-padding // self.max_seqlen)

    def shrunk(self, share: int) -> Budget:
        """About a `share`-th of everything but the longest document."""
        tokens = max(self.tokens // share, self.max_seqlen)
        documents = max(self.documents // share, self.pad_documents(tokens))
        return Budget(tokens, documents, -(-self.images // share), -(-self.labels // share), self.max_seqlen)

    def misfit(self, sample: Sample) -> str | None:
        """Why the sample can never be packed, or None."""
        longest = max((len(document) for document in sample.documents), default=0)
        documents = len(sample.documents) + self.pad_documents(max(self.tokens - sample.tokens, 0))
        over = [
            f"{needed} {what}, the budget is {limit} ({option})"
            for what, needed, limit, option in (
                ("tokens in one document", longest, self.max_seqlen, "--max-seqlen"),
                ("tokens", sample.tokens, self.tokens, "--tokens-per-batch"),
                (
                    "documents, its padding's too",
                    documents,
                    self.documents,
                    "--documents-per-batch",
                ),
                ("images", len(sample.images), self.images, "--images-per-batch"),
                ("labelled tokens", sample.labels, self.labels, "--labels-per-batch"),
            )
            if needed > limit
        ]
        return "; ".join(over) or None

    @staticmethod
    def measure(
        samples: Iterable[Sample],
        tokens: int,
        slack: float = 1.03,
        longest: int = 2**31,
    ) -> Budget:
        """Budgets in proportion to what the given samples hold, for batches of `tokens` tokens.

        max_seqlen is the longest document seen, rounded up to 8 but to no more than `longest`.
        Samples over `tokens` are not counted: the packer will leave them out. Raises ValueError
        without samples, or when none fits.
        """
        samples = sorted(samples, key=lambda sample: sample.tokens)
        if not samples:
            raise ValueError("the data set is empty: no sample to measure the budgets on")
        if samples[0].tokens > tokens:
            raise ValueError(
                f"--tokens-per-batch {tokens} is smaller than one sample: {samples[0].name} has "
                f"{samples[0].tokens} tokens and is the smallest"
            )
        samples = [sample for sample in samples if sample.tokens <= tokens]
        total = sum(sample.tokens for sample in samples)
        seen = max(len(document) for sample in samples for document in sample.documents)
        max_seqlen = min(-(-seen // 8) * 8, longest)

        def share(count: int, least: int) -> int:
            return max(least, int(np.ceil(count * tokens / total * slack)))

        alone = max(len(s.documents) - (s.tokens - tokens) // max_seqlen for s in samples)  # with its batch's padding
        return Budget(
            tokens=tokens,
            documents=max(share(sum(len(sample.documents) for sample in samples), 1) + 4, alone),
            images=share(sum(len(sample.images) for sample in samples), max(len(s.images) for s in samples)),
            labels=share(sum(sample.labels for sample in samples), max(s.labels for s in samples)),
            max_seqlen=max_seqlen,
        )


def pack(samples: list[Sample], budget: Budget, image_tokens: int, image_size: int) -> PackedBatch:
    """Lay the samples' documents end to end. They must fit the budget; `image_tokens` is the rows per image."""
    input_ids = np.zeros(budget.tokens, np.int64)
    position_ids = np.zeros(budget.tokens, np.int32)
    image_rows = np.full(budget.tokens, -1, np.int32)
    images = np.zeros((budget.images, 3, image_size, image_size), np.uint8)
    label_index = np.zeros(budget.labels, np.int64)
    labels = np.full(budget.labels, IGNORE, np.int64)
    cu_seqlens, n_images, n_labels, end = [0], 0, 0, 0
    for sample in samples:
        images[n_images : n_images + len(sample.images)] = sample.images
        for document in sample.documents:
            start, end = end, end + len(document)
            input_ids[start:end] = document.input_ids
            position_ids[start:end] = np.arange(len(document))
            rows = document.image_rows
            image_rows[start:end] = np.where(rows >= 0, rows + n_images * image_tokens, -1)
            (labelled,) = np.nonzero(document.labels != IGNORE)
            label_index[n_labels : n_labels + len(labelled)] = start + labelled
            labels[n_labels : n_labels + len(labelled)] = document.labels[labelled]
            n_labels += len(labelled)
            cu_seqlens.append(end)
        n_images += len(sample.images)
    n_documents = len(cu_seqlens) - 1
    n_tokens = end
    while end < budget.tokens:  # padding, in documents of its own that no kernel finds too long
        start, end = end, min(end + budget.max_seqlen, budget.tokens)
        position_ids[start:end] = np.arange(end - start)
        cu_seqlens.append(end)
    cu_seqlens += [budget.tokens] * (budget.documents + 1 - len(cu_seqlens))
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        images=torch.from_numpy(images),
        image_rows=torch.from_numpy(image_rows),
        label_index=torch.from_numpy(label_index),
        labels=torch.from_numpy(labels),
        max_seqlen=budget.max_seqlen,
        n_tokens=n_tokens,
        n_images=n_images,
        n_documents=n_documents,
        n_labels=n_labels,
        n_samples=len(samples),
        n_pairs=sum(len(d) * (len(d) + 1) // 2 for sample in samples for d in sample.documents),
        names=tuple(sample.name for sample in samples),
    )


@dataclass
class PaddedBatch:
    """What the reference takes: a row a document, images repeated for each, text left-padded as nanoVLM v0.1 does."""

    input_ids: Tensor  # (B, S) int64
    images: Tensor  # (B, n, 3, H, W) uint8
    attention_mask: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64, -100 where there is no loss


def pad(samples: list[Sample], length: int) -> PaddedBatch:
    """Every document as a padded row of `length` text tokens; all must show the same number of images.

    Raises ValueError if a text is longer.
    """
    documents = [(sample, document) for sample in samples for document in sample.documents]
    longest = max(int((document.image_rows < 0).sum()) for _, document in documents)
    if longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit rows of {length}")
    input_ids = np.zeros((len(documents), length), np.int64)
    mask, targets = np.zeros_like(input_ids), np.full_like(input_ids, IGNORE)
    for row, (_, document) in enumerate(documents):
        text = document.image_rows < 0
        start = length - int(text.sum())
        input_ids[row, start:], mask[row, start:] = document.input_ids[text], 1
        targets[row, start:] = document.labels[text]
    images = np.stack([sample.images for sample, _ in documents])
    return PaddedBatch(*(torch.from_numpy(array) for array in (input_ids, images, mask, targets)))


class Packer:
    """Chooses the samples of the next batch from a buffer: in order of arrival, then best fit for what is left.

    Taking arrivals first keeps the batches a fair draw of the data (the oldest sample is always taken); only the
    last gap is filled by size. Deterministic: the same samples in the same order give the same batches.
    """

    def __init__(self, budget: Budget):
        self.budget = budget
        self.buffer: list[Sample] = []

    def add(self, sample: Sample) -> str | None:
        """Take the sample into the buffer; returns why not if it can never fit."""
        misfit = self.budget.misfit(sample)
        if misfit is None:
            self.buffer.append(sample)
        return misfit

    def next(self) -> list[Sample]:
        """Remove and return the samples of one batch; empty when the buffer is."""
        budget, chosen, taken = self.budget, [], [0, 0, 0, 0]

        def fits(sample: Sample) -> bool:
            tokens, documents, images, labels = (used + more for used, more in zip(taken, sample.sizes, strict=True))
            return (
                tokens <= budget.tokens
                and documents + budget.pad_documents(budget.tokens - tokens) <= budget.documents
                and images <= budget.images
                and labels <= budget.labels
            )

        def take(position: int) -> None:
            chosen.append(position)
            for i, more in enumerate(self.buffer[position].sizes):
                taken[i] += more

        arrivals = 0
        while arrivals < len(self.buffer) and fits(self.buffer[arrivals]):
            take(arrivals)
            arrivals += 1
        rest = sorted(range(arrivals, len(self.buffer)), key=lambda i: -self.buffer[i].tokens)
        for position in rest:
            if fits(self.buffer[position]):
                take(position)
        batch = [self.buffer[position] for position in chosen]
        left = set(range(len(self.buffer))) - set(chosen)
        self.buffer = [self.buffer[position] for position in sorted(left)]
        return batch

    def state_dict(self) -> list[int]:
        """Keys of the buffered samples, in order: with the samples themselves, all that a resume needs."""
        return [sample.key for sample in self.buffer]

    def load_state_dict(self, keys: list[int], load: Callable[[int], Sample]) -> None:
        """Refill the buffer; `load(key)` returns the sample of a key."""
        self.buffer = [load(key) for key in keys]
