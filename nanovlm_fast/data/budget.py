"""The fixed sizes of a run's batches, measured on a draw of its data."""

from __future__ import annotations

import dataclasses
import os
from itertools import islice

import numpy as np

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.samples import SampleLoader, TooLong
from nanovlm_fast.device import pick_device
from nanovlm_fast.model.flops import step_flops
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Budget, Packer

# The head's products have a row per label. On a GPU they run in tiles of 128 rows, and a number of
# rows that is no multiple of 8 makes torch.compile copy the head's inputs to pad them.
LABEL_MULTIPLE = {"cuda": 128, "cpu": 1, "mps": 1}


def even_draw(load: SampleLoader, count: int = 1000) -> list[Sample]:
    """`count` samples, spread evenly over the first epoch, as if their pixels took no memory.

    A thousand pictures in tiles would take 10 GB. Unreadable ones are left out here; the stream
    counts and names them when it meets them. Raises ValueError, with a reason, if none is left.
    """
    samples = []
    first: ValueError | None = None
    # unique: of a data set smaller than `count`, each example is read once
    for position in np.unique(np.linspace(0, max(len(load.source) - 1, 0), count).astype(int)):
        try:
            sample = load(int(position))
            if sample.documents:  # not all of its turns are rated too low
                nothing = np.zeros((len(sample.images), 0), np.uint8)
                samples.append(dataclasses.replace(sample, images=nothing))
        except ValueError as error:
            first = first or error
    if not samples and not first and len(load.source):
        low = "a turn: all are rated too low (--min-rating-...), or were when it was prepared"
        raise ValueError(f"--data {load.train.data}: no example is left with {low}")
    if not samples and first:
        what = "fits" if isinstance(first, TooLong) else "could be read"
        raise ValueError(f"--data {load.train.data}: no example {what}. The first: {first}")
    return samples


def check_memory(budget: Budget, image_size: int) -> None:
    """Raise ValueError if this machine cannot hold one batch of the budget.

    Allocating it would not fail: Linux promises more memory than it has, and kills later.
    """
    # 16 bytes per token (id 8, position 4, image row 4) and per label (position 8, id 8)
    needed = 3 * budget.images * image_size**2 + 16 * (budget.tokens + budget.labels)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"--tokens-per-batch {budget.tokens} with {budget.images} images takes "
            f"{needed / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f}: take fewer"
        )


# Places for images to try, as shares of what batches need on average. With as many as that, tokens
# and images end a batch in turn, and neither is full
SHARES = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85)


def with_best_images(
    budget: Budget, samples: list[Sample], look_ahead: int, image_cost: float
) -> Budget:
    """The budget with as many places for images as let a batch compute the least on padding.

    `image_cost` is what a place for an image costs, in tokens. Places that hold tiles of 512 pixels
    cost hundreds of tokens each, so it pays to leave a few tokens empty to have these full.
    """
    fitting = [sample for sample in samples if not budget.misfit(sample)]
    most = max((len(sample.images) for sample in fitting), default=0)
    sizes = {max(most, round(share * budget.images)) for share in SHARES}
    budgets = [dataclasses.replace(budget, images=size) for size in sorted(sizes, reverse=True)]
    return max(budgets, key=lambda one: useful_share(one, fitting, look_ahead, image_cost))


def useful_share(
    budget: Budget, samples: list[Sample], look_ahead: int, image_cost: float
) -> float:
    """How much of what batches of this budget compute is not padding, by packing the samples."""
    packer = Packer(budget)
    waiting = iter(samples)
    useful = 0.0
    batches = 0
    while True:
        packer.buffer += islice(waiting, look_ahead - len(packer.buffer))
        # What remains at the end is no fair draw, and makes batches that are not full
        if len(packer.buffer) < look_ahead and batches:
            break
        batch = packer.next()
        useful += sum(sample.tokens + image_cost * len(sample.images) for sample in batch)
        batches += 1
    return useful / (batches * (budget.tokens + image_cost * budget.images))


def measure_budget(load: SampleLoader, train: TrainConfig, probe: int = 1000) -> Budget:
    """The sizes that `train` gives, and in place of zeros what a draw of the source needs.

    Raises ValueError, with the first reason, if nothing in the draw can be read, fits, or carries a
    label: such a run would end without a step.
    """
    limit = load.model.lm_max_position_embeddings
    nothing = f"--data {train.data}: no example fits the budgets. The first:"
    if train.max_seqlen > limit:
        model = f"the model's --lm-max-position-embeddings {limit}"
        raise ValueError(f"--max-seqlen {train.max_seqlen} is over {model}")
    samples = even_draw(load, probe)
    room = train.max_seqlen or limit
    # What the packer leaves out must not count in what a batch needs
    fitting = [
        sample for sample in samples if all(len(document) <= room for document in sample.documents)
    ]
    if samples and not fitting:
        longest = max(len(document) for document in samples[0].documents)
        option = f"--{'max-seqlen' if train.max_seqlen else 'lm-max-position-embeddings'} is {room}"
        document = f"{longest} tokens in one document"
        raise ValueError(f"{nothing} {samples[0].name}: {document}, {option}")
    multiple = LABEL_MULTIPLE[pick_device(train.device).type]
    measured = Budget.measure(fitting, train.tokens_per_batch, room, label_multiple=multiple)
    if any(len(sample.images) > 1 for sample in fitting):
        cost = step_flops(load.model, 1, 0, 0, 0) / step_flops(load.model, 0, 1, 0, 0)
        measured = with_best_images(measured, fitting, train.look_ahead, cost)
    budget = Budget(
        tokens=train.tokens_per_batch,
        documents=train.documents_per_batch or measured.documents,
        images=train.images_per_batch or measured.images,
        labels=train.labels_per_batch or measured.labels,
        max_seqlen=train.max_seqlen or measured.max_seqlen,
    )
    check_memory(budget, load.model.vit_img_size)
    # None misfits a measured budget, but one that `train` gives may leave all of them out
    misfits = [(sample.name, budget.misfit(sample)) for sample in samples]
    if all(misfit for _, misfit in misfits):
        name, misfit = misfits[0]
        raise ValueError(f"{nothing} {name}: {misfit}")
    if not any(sample.labels for sample in samples):
        raise ValueError(
            f"--data {train.data}: no answer in any example, there is nothing to learn"
        )
    return budget
