"""`Budget`, the fixed sizes of a run's batches, and `Packer`, which chooses the samples of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nanovlm_fast.packing.documents import Sample

# Room in a batch over what the average sample needs, in standard deviations of a batch's need,
# chosen by cost on the 222M model (bench/NOTES.md). A place for an image is computed whether it is
# taken or not, and costs as much as 163 tokens: none to spare. A place for a label costs a quarter
# of a token, and one for a document next to nothing.
ROOM = {"images": 0.0, "labels": 2.0, "documents": 3.0}
# Where samples have several images: the share of a batch that is taken in order of arrival, and the
# samples after that among which the rest is looked for (bench/tiles)
IN_ORDER = 0.5
CANDIDATES = 128


@dataclass(frozen=True)
class Budget:
    """Fixed sizes of a packed batch. `documents` includes those that padding is cut into."""

    tokens: int
    documents: int
    images: int
    labels: int
    max_seqlen: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # A batch of text has no images, and one without answers (generation) no labels
            least = 0 if field.name in ("images", "labels") else 1
            value = getattr(self, field.name)
            if value < least:
                raise ValueError(f"budget {field.name} = {value} is too small for any sample")
        # An empty batch, at the end of a rank's data, is all padding and must be possible
        if self.documents < self.pad_documents(self.tokens):
            raise ValueError(
                f"budget of {self.documents} documents (--documents-per-batch): {self.tokens} "
                f"tokens need at least {self.pad_documents(self.tokens)} documents of max_seqlen "
                f"{self.max_seqlen} (--max-seqlen)"
            )

    def pad_documents(self, padding: int) -> int:
        """Documents that so many unused positions are cut into, none longer than max_seqlen."""
        return -(-padding // self.max_seqlen)  # rounded up

    def shrunk(self, share: int) -> Budget:
        """About 1/`share` of everything but the longest document, which must still fit."""
        tokens = max(self.tokens // share, self.max_seqlen)
        return Budget(
            tokens=tokens,
            documents=max(self.documents // share, self.pad_documents(tokens)),
            images=-(-self.images // share),
            labels=-(-self.labels // share),
            max_seqlen=self.max_seqlen,
        )

    def misfit(self, sample: Sample) -> str | None:
        """Why the sample can never be packed; None if it fits into an empty batch."""
        longest = max((len(document) for document in sample.documents), default=0)
        # With those of the padding that a batch of this sample alone would have
        padding = max(self.tokens - sample.tokens, 0)
        documents = len(sample.documents) + self.pad_documents(padding)
        needs = (
            ("tokens in one document", longest, self.max_seqlen, "--max-seqlen"),
            ("tokens", sample.tokens, self.tokens, "--tokens-per-batch"),
            ("documents with padding", documents, self.documents, "--documents-per-batch"),
            ("images", len(sample.images), self.images, "--images-per-batch"),
            ("labelled tokens", sample.labels, self.labels, "--labels-per-batch"),
        )
        over = [
            f"{needed} {what}, the budget is {limit} ({option})"
            for what, needed, limit, option in needs
            if needed > limit
        ]
        return "; ".join(over) or None

    @staticmethod
    def measure(
        samples: Iterable[Sample],
        tokens: int,
        longest: int = 2**31,
        label_multiple: int = 1,
    ) -> Budget:
        """Budgets for batches of `tokens` tokens, in proportion to what the samples hold.

        Over the average they have the `ROOM` that the spread of the samples asks for. Labels are
        rounded up to a multiple of `label_multiple`. max_seqlen is the longest document seen,
        rounded up to a multiple of 8 but to no more than `longest`. Samples over `tokens` are not
        counted: the packer leaves them out. Raises ValueError without samples, or if none fits.
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
        lengths = np.array([sample.tokens for sample in samples])
        seen = max(len(document) for sample in samples for document in sample.documents)
        max_seqlen = min(-(-seen // 8) * 8, longest)

        def share(counts: list[int], deviations: float) -> int:
            """What a whole batch needs on average, and so many standard deviations more."""
            rate = sum(counts) / lengths.sum()
            # Of a sample from its share by length: a long sample with more labels is no surprise.
            spread = np.std(np.array(counts) - rate * lengths)
            in_batch = tokens / lengths.mean()  # samples
            return int(np.ceil(rate * tokens + deviations * spread * in_batch**0.5))

        documents = [len(sample.documents) for sample in samples]
        images = [len(sample.images) for sample in samples]
        labels = [sample.labels for sample in samples]
        # Each sample must fit on its own too, or it could never be packed. A batch of one sample is
        # mostly padding, whose documents count: -(s.tokens - tokens) // max_seqlen, rounded up
        alone = max(
            len(sample.documents) - (sample.tokens - tokens) // max_seqlen for sample in samples
        )
        # 4: for the padding of full batches
        room_for_documents = share(documents, ROOM["documents"]) + 4
        # A batch has no more labels than tokens, however their share varies
        room_for_labels = min(max(share(labels, ROOM["labels"]), max(labels)), tokens)
        return Budget(
            tokens=tokens,
            documents=max(room_for_documents, alone),
            images=max(share(images, ROOM["images"]), max(images)),
            labels=-(-room_for_labels // label_multiple) * label_multiple,
            max_seqlen=max_seqlen,
        )


@dataclass
class Filling:
    """A batch while it is filled: numbers of the samples in the buffer, and what they take."""

    budget: Budget
    buffer: Sequence[Sample]
    chosen: list[int] = dataclasses.field(default_factory=list)
    tokens: int = 0
    documents: int = 0
    images: int = 0
    labels: int = 0

    def fits(self, number: int, share: float = 1.0) -> bool:
        """Whether there is room for a sample, in that share of the budget's tokens and images."""
        budget = self.budget
        sample = self.buffer[number]
        tokens = self.tokens + sample.tokens
        # The fewer tokens a batch has, the more documents its padding takes
        padding = budget.pad_documents(max(budget.tokens - tokens, 0))
        return (
            tokens <= share * budget.tokens
            and self.documents + len(sample.documents) + padding <= budget.documents
            and self.images + len(sample.images) <= share * budget.images
            and self.labels + sample.labels <= budget.labels
        )

    def take(self, number: int) -> None:
        self.chosen.append(number)
        tokens, documents, images, labels = self.buffer[number].sizes
        self.tokens += tokens
        self.documents += documents
        self.images += images
        self.labels += labels

    def take_that_fit(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if self.fits(number):
                self.take(number)

    def fill_images(self, first: int) -> None:
        """Take samples from number `first` on so that the places for images are all but full.

        A knapsack: of all sums of images that can be reached, the largest, with the fewest tokens.
        """
        gap = self.budget.images - self.images
        room = self.budget.tokens - self.tokens
        # Sum of images -> (tokens, numbers) of the cheapest way to it
        ways: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
        for number in range(first, min(first + CANDIDATES, len(self.buffer))):
            sample = self.buffer[number]
            images = len(sample.images)
            if not 0 < images <= gap:
                continue
            # From the largest sum down, so that no sample is taken twice
            for before, (tokens, numbers) in sorted(ways.items(), reverse=True):
                after = before + images
                more = tokens + sample.tokens
                if after <= gap and more <= room and (after not in ways or more < ways[after][0]):
                    ways[after] = (more, (*numbers, number))
        self.take_that_fit(ways[max(ways)][1])


class Packer:
    """Chooses the samples of each batch from a buffer: in order of arrival, then by best fit.

    The oldest sample is always taken, and only the last gap is filled by size, so batches remain a
    fair draw of the data: best fit alone would collect small samples for the end of an epoch.
    Deterministic: the same samples in the same order give the same batches.

    Where samples have several images (the tiles of a picture, mostly), these decide what a batch
    costs, and their sizes are coarse: half of a batch is then taken in order of arrival, and the
    rest is what fills its places for images.
    """

    def __init__(self, budget: Budget):
        self.budget = budget
        self.buffer: list[Sample] = []

    def add(self, sample: Sample) -> str | None:
        """Take the sample into the buffer; returns the reason if it can never fit, else None."""
        misfit = self.budget.misfit(sample)
        if misfit is None:
            self.buffer.append(sample)
        return misfit

    def next(self) -> list[Sample]:
        """Remove the samples of one batch from the buffer and return them.

        The list is empty only if the buffer is: `add` lets in what fits an empty batch.
        """
        filling = Filling(self.budget, self.buffer)
        several = any(len(sample.images) > 1 for sample in self.buffer)
        share = IN_ORDER if several else 1.0
        arrivals = 0
        while arrivals < len(self.buffer) and (
            filling.fits(arrivals, share) or (not arrivals and filling.fits(0))
        ):
            filling.take(arrivals)
            arrivals += 1
        if several:
            filling.fill_images(arrivals)
        taken = set(filling.chosen)
        left = [number for number in range(arrivals, len(self.buffer)) if number not in taken]
        # The sort is stable, so the older of two equal samples goes first
        filling.take_that_fit(sorted(left, key=lambda number: -self.buffer[number].tokens))
        batch = [self.buffer[number] for number in filling.chosen]
        rest = set(range(len(self.buffer))) - set(filling.chosen)
        self.buffer = [self.buffer[number] for number in sorted(rest)]
        return batch

    def state_dict(self) -> list[int]:
        """Keys of the buffered samples, in order.

        That is all: the samples themselves are read again, which keeps checkpoints small.
        """
        return [sample.key for sample in self.buffer]

    def load_state_dict(self, keys: list[int], load: Callable[[int], Sample]) -> None:
        """Refill the buffer; `load(key)` returns the sample of a key."""
        self.buffer = [load(key) for key in keys]
