"""Random records and batches give a success or a clear error.

They never cause a hang, a crash or an allocation of gigabytes. Everything is drawn from fixed
seeds, so a failure names the case that makes it fail again.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanovlm_fast.data import prepare
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.registry import make_tokenizer
from nanovlm_fast.data.stream import PackedStream, initial_states
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.data.workers import loader
from nanovlm_fast.packing.batch import PackedBatch, pack
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.packing.packer import Budget, Packer
from nanovlm_fast.presets import preset
from tests.support.fuzz import GIB, Hung, at_most, damaged, no_gigabytes

pytestmark = [pytest.mark.timeout(200), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _guarded() -> Iterator[None]:
    with no_gigabytes():
        yield


def test_the_guards_guard():
    """The time limit and the memory limit stop what they should stop.

    The tests of random records, batches and files rely on them.
    """
    with pytest.raises(Hung, match="endless"), at_most(0.05, "endless"):
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))
    with pytest.raises(MemoryError):
        bytearray(3 * GIB)


# ---- records

NASTY: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**400, 1e308, float("inf"), float("nan"),
    "", " ", "\0", "\ud800", "\udfff x",
    "<image>", "<image>" * 50, "../outside.png", "/etc/passwd", "a\nb", "\x1b[2J", "\u2028",
    "x" * 5000, "日本語 🙂",
    [], {}, [[]], [None], {"from": 1}, {"from": "human"}, {"from": ["human"], "value": {}},
    "half.jpg", "text.png",
    "loop.png", " ".join(map(str, range(1000))),
    "pipe.png", "folder", "good.png/more", ["good.png"] * 3, "x" * 300 + ".png",
    "{question}", "%s", "system",
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    items = list(
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else []
    )
    return [(value, key) for key, _ in items] + [
        place for _, inner in items for place in places(inner)
    ]


def random_record(rng: random.Random) -> bytes:
    """A line that began as LLaVA's format, and in most cases is no longer in it."""
    turns = []
    for i in range(rng.randint(1, 3)):
        turns += [
            {"from": "human", "value": "<image>\nWhat?" if not i else "And?"},
            {"from": "gpt", "value": "A cat"},
        ]
    record: Any = {
        "id": 7,
        "image": rng.choice(["good.png", ["good.png"], "good.jpg"]),
        "conversations": turns,
    }
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        container, key = rng.choice(places(record))
        action = rng.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1:
            container[key] = [container[key]] * rng.randint(1, 3)
        else:
            container[key] = rng.choice(NASTY)
        if not places(record):
            break
    line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        line = damaged(line, rng)
    if rng.random() < 0.01:
        line = line[:-1] + b', "deep": ' + rng.choice((b"[", b'{"a":')) * rng.choice((900, 100_000))
    if rng.random() < 0.01:
        line = line.replace(b"A cat", b"9" * 10_000)
    return line.replace(b"\n", b" ").strip() or b"{"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with good pictures, and with everything that is no picture."""
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    noise.save(folder / "good.png")
    noise.save(folder / "good.jpg")
    (folder / "half.jpg").write_bytes((folder / "good.jpg").read_bytes()[:400])
    (folder / "text.png").write_text("no image at all")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    prepare.os.mkfifo(folder / "pipe.png")  # opening it waits for ever
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    return folder


def loader_of(source: JsonLines) -> SampleLoader:
    model, train = preset("tiny")
    model.vit_img_size, model.mp_pixel_shuffle_factor, model.lm_vocab_size = 16, 2, 300
    train.workers, train.epochs, train.curriculum, train.look_ahead = 0, 1.0, "", 64
    text = TextProcessor(
        make_tokenizer(model, source), model.prompt, model.image_tokens, train.turns
    )
    return SampleLoader(source, model, train, text)


def test_10000_random_records_are_read_or_refused_by_name(pictures):
    rng = random.Random(0)
    records = [random_record(rng) for _ in range(10_000)]
    (pictures / "train.jsonl").write_bytes(b"\n".join(records))
    source = JsonLines("train", pictures)
    assert len(source) == 10_000
    load = loader_of(source)  # this trains a tokenizer on what can be read
    refused = {}
    for i, line in enumerate(records):
        with at_most(5, line):
            try:
                load.load(i)
            except ValueError as error:
                refused[i] = str(error)
                assert refused[i].startswith(f"{source.file}:{i + 1}: "), (refused[i], line)
                assert refused[i].isprintable() and len(refused[i]) < 2000, refused[i]
    assert 3000 < len(refused) < 8000, "the records are all alike"
    budget = Budget(tokens=600, documents=80, images=40, labels=300, max_seqlen=200)
    seen, bad, too_long = [], {}, 0
    for batch in loader(PackedStream(load, budget, initial_states(1))):
        check_sizes(batch.packed, budget)
        seen += batch.packed.names
        bad |= batch.bad
        too_long += len(batch.too_long)
    assert bad == refused
    assert len(seen) == len(set(seen)) == 10_000 - len(bad) - too_long and 0 < too_long < 500


# ---- batches


def random_budget(rng: np.random.Generator) -> Budget:
    tokens, longest = int(rng.integers(1, 200)), int(rng.integers(1, 60))
    documents = -(-tokens // longest) + int(rng.integers(0, 12))
    return Budget(tokens, documents, int(rng.integers(0, 5)), int(rng.integers(0, 60)), longest)


def random_sample(rng: np.random.Generator, key: int) -> Sample:
    """Documents of any length, on up to three images of one token each, labelled anywhere."""
    n_images, documents = int(rng.integers(0, 3)), []
    for _ in range(int(rng.integers(1, 6))):
        text = int(rng.choice((0, 1, rng.integers(1, 12), rng.integers(1, 70))))
        rows = rng.permutation(np.concatenate([np.arange(n_images), np.full(text, -1)])).astype(
            np.int32
        )
        labels = np.where(rng.random(len(rows)) < 0.3, rng.integers(0, 99, len(rows)), IGNORE)
        documents.append(Document(rng.integers(0, 99, len(rows)), rows, labels))
    images = rng.integers(0, 256, (n_images, 3, 2, 2)).astype(np.uint8)
    return Sample(f"sample-{key}", images, documents, key)


def check_sizes(packed: PackedBatch, budget: Budget) -> None:
    """Check the sizes, positions and padding of a batch.

    The shapes are static. The documents cover all positions, and none is too long. Positions start
    at 0 in each document, and padding has no effect.
    """
    starts = packed.cu_seqlens.numpy()
    assert len(starts) == budget.documents + 1 and starts[0] == 0 and starts[-1] == budget.tokens
    lengths = np.diff(starts)
    assert (lengths >= 0).all() and lengths.max() <= budget.max_seqlen == packed.max_seqlen
    positions = np.arange(budget.tokens) - np.repeat(starts[:-1], lengths)
    assert (packed.position_ids.numpy() == positions).all()
    assert (
        len(packed.images) == budget.images
        and len(packed.labels) == len(packed.label_index) == budget.labels
    )
    assert len(packed.input_ids) == len(packed.image_rows) == budget.tokens
    assert starts[packed.n_documents] == packed.n_tokens
    assert (packed.image_rows[packed.n_tokens :] == -1).all() and (
        packed.labels[packed.n_labels :] == IGNORE
    ).all()
    assert (packed.labels[: packed.n_labels] != IGNORE).all() and not packed.images[
        packed.n_images :
    ].any()


def check_content(packed: PackedBatch, samples: list[Sample]) -> None:
    """Check that ids, labels and the pixels behind every row are those of the samples, in order."""
    documents = [(sample, document) for sample in samples for document in sample.documents]
    ids = np.concatenate([document.input_ids for _, document in documents])
    assert packed.n_tokens == len(ids) and (packed.input_ids.numpy()[: len(ids)] == ids).all()
    targets = np.full(len(packed.input_ids), IGNORE)
    targets[packed.label_index[: packed.n_labels].numpy()] = packed.labels[
        : packed.n_labels
    ].numpy()
    assert (
        targets[: len(ids)] == np.concatenate([document.labels for _, document in documents])
    ).all()
    assert (targets[len(ids) :] == IGNORE).all() and packed.n_documents == len(documents)
    assert packed.n_images == sum(
        len(sample.images) for sample in samples
    ) and packed.n_samples == len(samples)
    images, rows, starts = (
        packed.images.numpy(),
        packed.image_rows.numpy(),
        packed.cu_seqlens.numpy(),
    )
    for (sample, document), start in zip(documents, starts, strict=False):
        got, shown = rows[start : start + len(document)], document.image_rows >= 0
        assert ((got >= 0) == shown).all()
        assert (images[got[shown]] == sample.images[document.image_rows[shown]]).all()


def test_10000_random_batches_keep_every_sample_and_every_budget():
    rng, batches, refusals = np.random.default_rng(0), 0, 0
    pool = [random_sample(rng, 0) for _ in range(3000)]
    while batches < 10_000:
        drawn = rng.integers(0, len(pool), int(rng.integers(1, 40)))
        budget, samples = (
            random_budget(rng),
            [replace(pool[i], key=key) for key, i in enumerate(drawn)],
        )
        with at_most(20, (budget, batches)):
            packer = Packer(budget)
            seen = [sample.key for sample in samples if packer.add(sample)]
            refusals += len(seen)
            while packer.buffer:
                if rng.random() < 0.1:  # a resume
                    keys, packer = json.loads(json.dumps(packer.state_dict())), Packer(budget)
                    packer.load_state_dict(keys, samples.__getitem__)
                chosen = packer.next()
                assert chosen, f"{budget} refuses {packer.buffer[0].sizes}, which it said would fit"
                packed = pack(chosen, budget, 1, 2)
                check_sizes(packed, budget)
                check_content(packed, chosen)
                seen += [sample.key for sample in chosen]
                batches += 1
            assert sorted(seen) == list(range(len(samples))), budget
    assert refusals > 1000


def test_a_record_of_twenty_thousand_images_is_refused_before_one_is_decoded(pictures):
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat"}]
    (pictures / "train.jsonl").write_text(
        json.dumps({"image": ["good.png"] * 20_000, "conversations": talk})
    )
    load = loader_of(JsonLines("train", pictures))
    with at_most(30, "images"), pytest.raises(ValueError, match=r"train\.jsonl:1: 20000 images"):
        load.load(0)
    assert not load.cache
