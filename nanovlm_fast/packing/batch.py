"""Samples -> `PackedBatch`: documents laid end to end in static shapes. Pure CPU, no model.

A *document* is what one attention block sees: image tokens and text. A *sample* is a group of documents that share
images, so an image with ten questions is encoded once and gathered ten times. The packer fills one batch at a time,
best fit over a look-ahead buffer, and never splits or mixes anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovlm_fast.packing.documents import IGNORE, Sample
from nanovlm_fast.packing.packer import Budget


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
    n_pairs: int = (
        0  # queries and keys that the causal mask lets meet, n (n + 1) / 2 a document of n
    )
    names: tuple[str, ...] = ()

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PackedBatch(
            **{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        )

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
