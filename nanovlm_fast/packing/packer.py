"""Budgets, and the packer that fills batches to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nanovlm_fast.packing.documents import Sample


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
                raise ValueError(
                    f"budget {field.name} = {getattr(self, field.name)} is too small for any sample"
                )
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
        return Budget(
            tokens, documents, -(-self.images // share), -(-self.labels // share), self.max_seqlen
        )

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

        alone = max(
            len(s.documents) - (s.tokens - tokens) // max_seqlen for s in samples
        )  # with its batch's padding
        return Budget(
            tokens=tokens,
            documents=max(share(sum(len(sample.documents) for sample in samples), 1) + 4, alone),
            images=share(
                sum(len(sample.images) for sample in samples), max(len(s.images) for s in samples)
            ),
            labels=share(sum(sample.labels for sample in samples), max(s.labels for s in samples)),
            max_seqlen=max_seqlen,
        )


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
            tokens, documents, images, labels = (
                used + more for used, more in zip(taken, sample.sizes, strict=True)
            )
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
