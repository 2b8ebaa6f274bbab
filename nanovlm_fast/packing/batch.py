"""Samples -> one batch: `PackedBatch` for the product, `PaddedBatch` for the reference model.

Runs on the CPU, without a model. Shapes of a packed batch, all fixed for a run (see `Budget`):

    T  tokens, padding included       input_ids, position_ids, image_rows
    D  documents, padding's included  cu_seqlens (D + 1,)
    N  images                         images (N, 3, H, W)
    L  labelled positions             label_index, labels

Fixed, because `torch.compile` would build a new graph for each new shape. Padding is cut into
documents of its own, so that it attends to nothing else and no document is over `max_seqlen`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.packing.packer import Budget


@dataclass
class PackedBatch:
    """Documents laid end to end, and how much of the batch is not padding."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int32, from 0 in every document
    cu_seqlens: Tensor  # (D + 1,) int32, where documents start; padded with T
    images: Tensor  # (N, 3, H, W) uint8; the device normalises, so a quarter of the bytes is copied
    image_rows: Tensor  # (T,) int32, rows of the projected image tokens, -1 for text
    # The head runs on labelled positions only: over a vocabulary of 49,152 its logits for all
    # positions would be the largest tensor of the step
    label_index: Tensor  # (L,) int64, positions that carry loss
    labels: Tensor  # (L,) int64, their targets, padded with -100
    max_seqlen: int
    # Counts, without padding
    n_tokens: int = 0
    n_images: int = 0
    n_documents: int = 0
    n_labels: int = 0
    n_samples: int = 0
    # Pairs of query and key that the causal mask admits: n (n + 1) / 2 per document of n tokens.
    # The FLOPs of attention follow from it
    n_pairs: int = 0
    names: tuple[str, ...] = ()

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def to(self, device: torch.device | str) -> PackedBatch:
        # For a CUDA device, from pinned memory (`pin_memory`). MPS would not wait for the copy.
        ahead = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=ahead))

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, from which a copy to the device is asynchronous."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until the work queued on `stream` so far is done with it (CUDA).

        Without this, the allocator gives the memory to the next copy as soon as Python drops the
        batch, while kernels may still read it.
        """
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)

    def trimmed(self) -> PackedBatch:
        """The batch without its padding: less work where shapes may change per step (eager)."""
        sizes = (
            (self.n_tokens, ("input_ids", "position_ids", "image_rows")),
            (self.n_documents + 1, ("cu_seqlens",)),
            (self.n_images, ("images",)),
            (self.n_labels, ("label_index", "labels")),
        )
        cut: dict[str, Any] = {}
        for size, names in sizes:
            for name in names:
                cut[name] = getattr(self, name)[:size]
        longest = int(cut["cu_seqlens"].diff().max()) if self.n_documents else 0
        return dataclasses.replace(self, **cut, max_seqlen=longest)


def pack(samples: list[Sample], budget: Budget, image_tokens: int, image_size: int) -> PackedBatch:
    """Lay the documents of the samples end to end.

    They must fit the budget, as `Packer` sees to. `image_tokens` is the number of tokens per image.
    """
    input_ids = np.zeros(budget.tokens, np.int64)
    position_ids = np.zeros(budget.tokens, np.int32)
    image_rows = np.full(budget.tokens, -1, np.int32)
    images = np.zeros((budget.images, 3, image_size, image_size), np.uint8)
    # Padding of label_index points at position 0; its label is IGNORE, so it has no loss
    label_index = np.zeros(budget.labels, np.int64)
    labels = np.full(budget.labels, IGNORE, np.int64)
    cu_seqlens = [0]
    n_images = 0
    n_labels = 0
    end = 0
    for sample in samples:
        images[n_images : n_images + len(sample.images)] = sample.images
        for document in sample.documents:
            start = end
            end = start + len(document)
            input_ids[start:end] = document.input_ids
            position_ids[start:end] = np.arange(len(document))
            # From rows of the sample's images to rows of the batch's
            rows = document.image_rows
            image_rows[start:end] = np.where(rows >= 0, rows + n_images * image_tokens, -1)
            (labelled,) = np.nonzero(document.labels != IGNORE)
            label_index[n_labels : n_labels + len(labelled)] = start + labelled
            labels[n_labels : n_labels + len(labelled)] = document.labels[labelled]
            n_labels += len(labelled)
            cu_seqlens.append(end)
        # After all its documents: they share the sample's images
        n_images += len(sample.images)
    n_documents = len(cu_seqlens) - 1
    n_tokens = end
    # Padding in documents of its own, none over max_seqlen: attention kernels are launched for
    # documents of at most that length
    while end < budget.tokens:
        start = end
        end = min(start + budget.max_seqlen, budget.tokens)
        position_ids[start:end] = np.arange(end - start)
        cu_seqlens.append(end)
    # The rest of the D documents are empty
    cu_seqlens += [budget.tokens] * (budget.documents + 1 - len(cu_seqlens))
    lengths = [len(document) for sample in samples for document in sample.documents]
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
        n_pairs=sum(length * (length + 1) // 2 for length in lengths),
        names=tuple(sample.name for sample in samples),
    )


@dataclass
class PaddedBatch:
    """What the reference takes, B documents of S text tokens.

    One row per document, its images repeated in each, padded on the left as nanoVLM does.
    """

    input_ids: Tensor  # (B, S) int64
    images: Tensor  # (B, n, 3, H, W) uint8; with image_rows (N, 3, H, W), those of all rows
    attention_mask: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64, -100 where there is no loss
    # (B, S) int64, rows of the tokens of all images, -1 for text; None: images precede the text
    image_rows: Tensor | None = None


def pad(samples: list[Sample], length: int) -> PaddedBatch:
    """Every document as a row of `length` text tokens; all must show the same number of images.

    Raises ValueError if a text is longer.
    """
    documents = [(sample, document) for sample in samples for document in sample.documents]
    longest = max(int((document.image_rows < 0).sum()) for _, document in documents)
    if longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit rows of {length}")
    input_ids = np.zeros((len(documents), length), np.int64)
    mask = np.zeros_like(input_ids)
    targets = np.full_like(input_ids, IGNORE)
    for row, (_, document) in enumerate(documents):
        # Text only: the reference puts the image tokens before it by itself
        text = document.image_rows < 0
        start = length - int(text.sum())
        input_ids[row, start:] = document.input_ids[text]
        mask[row, start:] = 1
        targets[row, start:] = document.labels[text]
    images = np.stack([sample.images for sample, _ in documents])
    return PaddedBatch(
        input_ids=torch.from_numpy(input_ids),
        images=torch.from_numpy(images),
        attention_mask=torch.from_numpy(mask),
        targets=torch.from_numpy(targets),
    )


def pad_whole(documents: list[tuple[Sample, Document]]) -> PaddedBatch:
    """Documents with their image tokens where they stand, padded to the longest."""
    shape = (len(documents), max(len(document) for _, document in documents))
    input_ids = np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORE, np.int64)
    image_rows = np.full(shape, -1, np.int64)
    shown = 0  # image tokens of the rows before
    for row, (_, document) in enumerate(documents):
        start = shape[1] - len(document)
        input_ids[row, start:] = document.input_ids
        mask[row, start:] = 1
        targets[row, start:] = document.labels
        own = document.image_rows
        image_rows[row, start:] = np.where(own >= 0, own + shown, -1)
        shown += int((own >= 0).sum())
    return PaddedBatch(
        input_ids=torch.from_numpy(input_ids),
        images=torch.from_numpy(np.concatenate([sample.images for sample, _ in documents])),
        attention_mask=torch.from_numpy(mask),
        targets=torch.from_numpy(targets),
        image_rows=torch.from_numpy(image_rows),
    )
