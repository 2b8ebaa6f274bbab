"""Properties of the packer: every sample exactly once, no budget exceeded, nothing mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.packing.batch import pack
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.packing.packer import Budget, Packer
from tests.support.samples import random_sample

CONFIG = VLMConfig(
    vit_img_size=16, vit_patch_size=4, vit_hidden_dim=12, vit_n_heads=1, lm_vocab_size=97
)  # 4 tokens per image


def sample_of(number: int, shape: tuple[int, list[int]]) -> Sample:
    """A sample whose ids and pixels all hold its number, so that mixing would show."""
    n_images, texts = shape
    documents = []
    for text in texts:
        image = n_images * CONFIG.image_tokens
        ids = np.concatenate([np.zeros(image, np.int64), np.full(text, number)])
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[image : image + text // 2] = number
        rows = np.concatenate([np.arange(image), np.full(text, -1)]).astype(np.int32)
        documents.append(Document(ids, rows, labels))
    images = np.full((n_images, 3, 16, 16), number % 256, np.uint8)
    return Sample(f"sample-{number}", images, documents, number)


shapes = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(1, 30), min_size=1, max_size=5)), max_size=60
)
budgets = st.builds(
    Budget,
    st.integers(60, 200),
    st.integers(20, 40),
    st.integers(1, 6),
    st.integers(5, 60),
    st.integers(10, 40),
)


def drain(packer: Packer) -> list[list[Sample]]:
    batches = []
    while batch := packer.next():
        batches.append(batch)
    return batches


@settings(max_examples=150, deadline=None)
@given(shapes, budgets)
def test_every_sample_once_and_nothing_mixed(shapes, budget):
    samples = [sample_of(i + 1, shape) for i, shape in enumerate(shapes)]
    packer = Packer(budget)
    refused = [sample.name for sample in samples if packer.add(sample)]
    fitting = [sample.name for sample in samples if budget.misfit(sample) is None]
    batches = drain(packer)
    seen = [sample.name for batch in batches for sample in batch]
    assert sorted(seen + refused) == sorted(sample.name for sample in samples)
    assert sorted(seen) == sorted(fitting)
    for batch in batches:
        check_packed(batch, budget)


def check_packed(samples: list[Sample], budget: Budget) -> None:
    packed = pack(samples, budget, CONFIG.image_tokens, CONFIG.vit_img_size)
    starts = packed.cu_seqlens.tolist()
    assert len(starts) == budget.documents + 1 and starts[0] == 0 and starts[-1] == budget.tokens
    lengths = packed.cu_seqlens.diff()
    assert (lengths >= 0).all() and lengths.max() <= budget.max_seqlen
    documents = [(sample, document) for sample in samples for document in sample.documents]
    assert packed.n_documents == len(documents) and packed.n_tokens == sum(
        s.tokens for s in samples
    )
    assert (packed.n_images, packed.n_samples) == (
        sum(len(s.images) for s in samples),
        len(samples),
    )
    label_index, labels = packed.label_index[: packed.n_labels], packed.labels[: packed.n_labels]
    assert (packed.labels[packed.n_labels :] == IGNORE).all() and packed.n_labels == sum(
        s.labels for s in samples
    )
    at = dict(zip(label_index.tolist(), labels.tolist(), strict=True))
    for (sample, document), start, end in zip(documents, starts, starts[1:], strict=False):
        assert end - start == len(document)
        assert packed.input_ids[start:end].tolist() == document.input_ids.tolist()
        assert packed.position_ids[start:end].tolist() == list(range(end - start))
        for i, label in enumerate(document.labels.tolist()):
            assert at.get(start + i, IGNORE) == label
        rows = packed.image_rows[start:end]
        assert ((rows >= 0).numpy() == (document.image_rows >= 0)).all()
        shown = packed.images[(rows[rows >= 0] // CONFIG.image_tokens).long()]
        assert (shown == sample.key % 256).all()
    assert (packed.image_rows[packed.n_tokens :] == -1).all()


@settings(max_examples=50, deadline=None)
@given(shapes, budgets)
def test_deterministic_and_resumable(shapes, budget):
    samples = {i: sample_of(i, shape) for i, shape in enumerate(shapes)}
    packers = [Packer(budget), Packer(budget)]
    for packer in packers:
        for sample in samples.values():
            packer.add(sample)
    for _ in range(2):
        assert [s.key for s in packers[0].next()] == [s.key for s in packers[1].next()]
    resumed = Packer(budget)
    resumed.load_state_dict(packers[0].state_dict(), samples.__getitem__)
    names = [
        [[s.key for s in batch] for batch in drain(packer)] for packer in (resumed, packers[0])
    ]
    assert names[0] == names[1]


def test_the_oldest_sample_is_never_starved():
    """However well later samples fit, the oldest goes first."""
    packer = Packer(Budget(100, 20, 4, 100, 50))
    for i in range(1, 40):
        packer.add(sample_of(i, (1, [10 + i % 7])))
    while packer.buffer:
        oldest = packer.buffer[0].name
        assert oldest in [sample.name for sample in packer.next()]


def test_padding_never_exceeds_max_seqlen():
    budget = Budget(tokens=100, documents=12, images=1, labels=50, max_seqlen=9)
    packed = pack([sample_of(5, (1, [3]))], budget, CONFIG.image_tokens, CONFIG.vit_img_size)
    assert packed.cu_seqlens.diff().max() <= 9 and packed.cu_seqlens[-1] == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": 3}, "documents"),
        ({"tokens": 0}, "tokens"),
        ({"max_seqlen": 0}, "max_seqlen"),
        ({"images": -1}, "images"),
    ],
)
def test_impossible_budgets_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Budget(**{**dict(tokens=100, documents=20, images=2, labels=10, max_seqlen=20), **change})


def test_a_sample_that_never_fits_is_named_with_the_reason():
    packer = Packer(Budget(tokens=100, documents=20, images=1, labels=100, max_seqlen=20))
    assert "21 tokens in one document, the budget is 20" in packer.add(sample_of(1, (0, [21])))
    assert "2 images, the budget is 1" in packer.add(sample_of(2, (2, [1])))
    assert packer.add(sample_of(3, (0, [20]))) is None


def test_measured_budget_fits_the_data_and_refuses_the_impossible(small_config):
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, small_config, 1, 3) for _ in range(50)]
    budget = Budget.measure(samples, 2000)
    assert all(budget.misfit(sample) is None for sample in samples)
    with pytest.raises(ValueError, match="smaller than one sample"):
        Budget.measure(samples, 10)
    with pytest.raises(ValueError, match="empty"):
        Budget.measure([], 2000)


def test_batches_move_between_devices_whole(small_config):
    rng = np.random.default_rng(0)
    packed = pack([random_sample(rng, small_config, 1, 2)], Budget(64, 8, 2, 64, 32), 4, 32)
    moved = packed.to("meta")
    assert moved.images.device.type == "meta" and moved.n_tokens == packed.n_tokens
    assert packed.images.dtype == torch.uint8


def test_a_sample_is_refused_that_its_own_padding_leaves_no_room_for():
    """If it were accepted it would never be chosen, and the stream would end as if the data had."""
    budget = Budget(tokens=43, documents=4, images=1, labels=40, max_seqlen=39)
    packer = Packer(budget)
    assert "5 documents with padding, the budget is 4" in packer.add(
        sample_of(1, (0, [4, 4, 5, 5]))
    )
    assert packer.add(sample_of(2, (0, [4, 5, 5]))) is None and packer.next()
    samples = [sample_of(1, (0, [30])), sample_of(2, (0, [2] * 3))]
    measured = Budget.measure(samples, 90)
    assert not any(measured.misfit(sample) for sample in samples)
