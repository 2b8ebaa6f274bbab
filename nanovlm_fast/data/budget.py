"""The static sizes of a run's batches, measured on its data."""

from __future__ import annotations

import os

import numpy as np

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.samples import SampleLoader, TooLong
from nanovlm_fast.packing.documents import IGNORE, Sample
from nanovlm_fast.packing.packer import Budget


def even_draw(load: SampleLoader, count: int = 1000) -> list[Sample]:
    """`count` samples evenly over the first epoch.

    Raises ValueError, with a first reason, if none can be used.
    """
    samples, first = [], None
    for position in np.unique(np.linspace(0, max(len(load.source) - 1, 0), count).astype(int)):
        try:
            samples.append(load(int(position)))
        except ValueError as error:  # counted and named when the stream meets it
            first = first or error
    if not samples and first:
        what = "fits" if isinstance(first, TooLong) else "could be read"
        raise ValueError(f"--data {load.train.data}: no example {what}. The first: {first}")
    return samples


def check_memory(budget: Budget, image_size: int) -> None:
    """Raise ValueError if this machine cannot hold one batch of the budget."""
    # ids, positions and image rows of a token, place and id of a label: 16 bytes each
    needed = 3 * budget.images * image_size**2 + 16 * (budget.tokens + budget.labels)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"--tokens-per-batch {budget.tokens} with {budget.images} images takes "
            f"{needed / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f}: take fewer"
        )


def measure_budget(load: SampleLoader, train: TrainConfig, probe: int = 1000) -> Budget:
    """The run's static sizes: what `train` gives, and for zeros what an even draw of the source needs.

    Raises ValueError, with a first reason, if nothing of the draw can be read, fits, or carries a label.
    """
    limit = load.model.lm_max_position_embeddings
    nothing = f"--data {train.data}: no example fits the budgets. The first:"
    if train.max_seqlen > limit:
        raise ValueError(
            f"--max-seqlen {train.max_seqlen} is over the model's --lm-max-position-embeddings {limit}"
        )
    samples = even_draw(load, probe)
    room = train.max_seqlen or limit
    # what is left out takes no part of a batch
    fitting = [
        sample for sample in samples if all(len(document) <= room for document in sample.documents)
    ]
    if samples and not fitting:
        longest = max(len(document) for document in samples[0].documents)
        option = f"--{'max-seqlen' if train.max_seqlen else 'lm-max-position-embeddings'} is {room}"
        document = f"{longest} tokens in one document"
        raise ValueError(f"{nothing} {samples[0].name}: {document}, {option}")
    measured = Budget.measure(fitting, train.tokens_per_batch, longest=room)
    budget = Budget(
        tokens=train.tokens_per_batch,
        documents=train.documents_per_batch or measured.documents,
        images=train.images_per_batch or measured.images,
        labels=train.labels_per_batch or measured.labels,
        max_seqlen=train.max_seqlen or measured.max_seqlen,
    )
    check_memory(budget, load.model.vit_img_size)
    misfits = [
        f"{sample.name}: {misfit}" for sample in samples if (misfit := budget.misfit(sample))
    ]
    if len(misfits) == len(samples):
        raise ValueError(f"{nothing} {misfits[0]}")
    if not any(
        (document.labels != IGNORE).any() for sample in samples for document in sample.documents
    ):
        raise ValueError(
            f"--data {train.data}: no answer in any example, there is nothing to learn"
        )
    return budget
