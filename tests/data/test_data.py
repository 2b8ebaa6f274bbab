"""From files to packed batches: images, text, sources, and the resumable stream."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.images import BadImage, augment, load_image
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.easy_vqa import EasyVQA
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.registry import load_source, texts
from nanovlm_fast.data.sources.synthetic import Synthetic
from nanovlm_fast.data.split import split_off
from nanovlm_fast.data.stream import PackedStream, advance, initial_states
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.data.workers import loader
from nanovlm_fast.packing.documents import IGNORE
from nanovlm_fast.presets import preset

PROMPT = "Question: {question} Answer:"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(texts(Synthetic("train"), PROMPT), 320)


# ---- images


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (40, 7), (16, 16)])
def test_every_kind_of_image_becomes_a_square(mode, size):
    pixels = load_image(Image.new(mode, size), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]


def test_sixteen_bits_of_grey_are_scaled():
    pixels = np.full((16, 16), 20000, np.uint16)
    assert (load_image(Image.fromarray(pixels), 16) == 20000 // 256).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_no_damage_escapes_as_another_error(form):
    image, exif = Image.effect_noise((32, 32), 80).convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, form, exif=exif)
    rng, whole = np.random.default_rng(0), np.frombuffer(buffer.getvalue(), np.uint8)
    for _ in range(150):
        damaged = whole.copy()
        damaged[rng.integers(0, min(len(whole), 200), 3)] = rng.integers(0, 256, 3)
        with contextlib.suppress(BadImage):
            assert load_image(damaged.tobytes(), 16).shape == (3, 16, 16)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 4))  # white on top
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the top comes to lie on the right
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = load_image(tmp_path / "turned.png", 16)
    assert (pixels[:, :, -4:] == 255).all() and (pixels[:, :, :12] == 0).all()


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "absent"])
def test_a_damaged_image_is_named(tmp_path, damage):
    file = tmp_path / "picture.png"
    Image.effect_noise((64, 64), 50).save(file)
    whole = file.read_bytes()
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(
            {"cut": whole[: len(whole) // 2], "garbage": b"\x00" * 99, "empty": b""}[damage]
        )
    with pytest.raises(BadImage, match=r"picture\.png"):
        load_image(file, 16)


def test_augmentation_keeps_what_it_should():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 16, 16)).astype(np.uint8)
    assert augment(images, "none", rng) is images
    for _ in range(20):
        turned = augment(images, "dihedral", rng)
        assert sorted(turned[0, 0].ravel()) == sorted(images[0, 0].ravel())
    assert {augment(images, "shift", rng).tobytes() for _ in range(9)} <= {
        images.tobytes(),
        images[..., ::-1].tobytes(),
    }


def test_a_shift_moves_the_drawing_whole_inside_its_margins():
    rng = np.random.default_rng(0)
    drawn = np.full((1, 3, 16, 16), 200, np.uint8)
    drawn[0, :, 3:8, 9:14] = rng.integers(0, 100, (3, 5, 5))
    places = set()
    for _ in range(200):
        moved = augment(drawn, "shift", rng)[0]
        rows, columns = (np.nonzero((moved != 200).any(0).any(axis))[0] for axis in (1, 0))
        cut = moved[:, rows[0] : rows[0] + 5, columns[0] : columns[0] + 5]
        assert (cut == drawn[0, :, 3:8, 9:14]).all() or (cut == drawn[0, :, 3:8, 13:8:-1]).all()
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 60 and {0, 11} <= {row for row, _ in places}


# ---- text


@pytest.mark.parametrize("text", ["is the square red?", "naïve café — 日本語 🙂", " \n\t", ""])
def test_tokenizer_gives_back_any_text(tokenizer, tmp_path, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(text) == tokenizer.encode(text) and again.eos_id == tokenizer.eos_id


def test_tokenizer_folder_is_what_transformers_reads(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("is the square red?") == tokenizer.encode("is the square red?")
    assert theirs.eos_token_id == tokenizer.eos_id


def test_decoding_stops_at_end_of_sequence(tokenizer):
    ids = [*tokenizer.encode(" red"), tokenizer.eos_id, *tokenizer.encode(" blue")]
    assert tokenizer.decode(ids) == " red"


def test_only_answers_carry_loss_and_labels_are_the_next_tokens(tokenizer):
    text = TextProcessor(tokenizer, PROMPT, image_tokens=4)
    document = text.document([("is it red?", "yes"), ("why?", "it is")], n_images=2)
    ids, labels = document.input_ids, document.labels
    labelled = np.nonzero(labels != IGNORE)[0]
    assert (labels[labelled] == ids[labelled + 1]).all()
    said = tokenizer.base.decode(labels[labelled].tolist(), skip_special_tokens=False)
    assert said == f" yes{tokenizer.eos} it is{tokenizer.eos}"
    assert document.image_rows.tolist() == [*range(8), *[-1] * (len(document) - 8)]
    asked = tokenizer.base.decode(ids[8:].tolist(), skip_special_tokens=False)
    assert (
        asked.startswith("Question: is it red? Answer: yes") and "Question: why? Answer:" in asked
    )


def test_turns_become_documents(tokenizer):
    turns = [("a?", "b"), ("c?", "d"), ("e?", "f")]
    counts = {
        mode: TextProcessor(tokenizer, PROMPT, 4, mode).documents(turns, 1)
        for mode in ("first", "independent", "chat")
    }
    assert [len(counts[mode]) for mode in ("first", "independent", "chat")] == [1, 3, 1]
    labels = {
        mode: sum((d.labels != IGNORE).sum() for d in documents)
        for mode, documents in counts.items()
    }
    assert labels["chat"] == labels["independent"] == 3 * labels["first"]
    prompt = TextProcessor(tokenizer, PROMPT, 4).document([("a?", "")], 1)
    assert (prompt.labels == IGNORE).all()


# ---- sources


def test_easy_vqa_is_what_it_says():
    train, test = EasyVQA("train"), EasyVQA("test")
    assert (len(train), len(test)) == (4000, 1000)
    assert sum(len(turns) for turns in train.turns.values()) == 38575
    assert sum(len(turns) for turns in test.turns.values()) == 9673
    first = train[0]
    assert (
        load_image(first.images[0], 64).shape == (3, 64, 64)
        and ("what is the blue shape?", "rectangle") in first.turns
    )


def test_held_out_examples_are_held_out():
    rest, held_out = split_off(Synthetic("train"), 40, seed=3)
    names = [{source[i].name for i in range(len(source))} for source in (rest, held_out)]
    assert len(names[1]) == 40 and not names[0] & names[1] and len(names[0] | names[1]) == 256


def write_jsonl(folder, records) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    )


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_llava_conversations_are_read(tmp_path):
    write_jsonl(
        tmp_path,
        [
            {"image": "a.png", "conversations": talk("<image>\nWhat?", "A cat.")},
            {"conversations": talk("Hi?", "Yes.")},
        ],
    )
    source = JsonLines("train", tmp_path)
    assert source[0].turns == [("What?", "A cat.")] and source[0].images == [tmp_path / "a.png"]
    assert source[1].turns == [("Hi?", "Yes.")] and source[1].images == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{not json", "conversation format"),
        ({"image": "a.png"}, "conversation format"),
        ({"image": "../secret.png", "conversations": talk("a", "b")}, "outside"),
        ({"image": "/etc/passwd", "conversations": talk("a", "b")}, "outside"),
        ({"image": "a.png", "conversations": talk("a")}, "alternate"),
        ({"conversations": talk("a", "b")[::-1]}, "found: gpt, human"),
        ({"conversations": [{"from": "system", "value": "s"}]}, "found: nothing"),
        (
            {"image": "a.png", "conversations": talk("<image><image> a", "b")},
            "2 times <image> for 1 images",
        ),
        ({"image": "a.png", "conversations": "hello"}, "conversation format"),
        ("[1, 2]", "conversation format"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path, record, message):
    write_jsonl(tmp_path, [{"conversations": talk("a", "b")}, record])
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: .*{message}"):
        JsonLines("train", tmp_path)[1]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_leaves_the_folder_is_no_way_out(tmp_path, what):
    outside, folder = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "a.png")
    link = "a.png" if what == "file" else "images/a.png"
    write_jsonl(
        folder, [{"image": name, "conversations": talk("a", "b")} for name in (link, "inner.png")]
    )
    (folder / Path(link).parts[0]).symlink_to(outside / "a.png" if what == "file" else outside)
    with pytest.raises(ValueError, match=r"train\.jsonl:1: .*outside"):
        JsonLines("train", folder)[0]
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    (folder / "inner.png").symlink_to(folder / "b.png")
    assert load_image(JsonLines("train", folder)[1].images[0], 8).shape == (3, 8, 8), (
        "links inside are followed"
    )


# ---- the stream


def stream_of(tokenizer, data="synthetic:32", states=None, **changes):
    model, train = preset("tiny")
    model = dataclasses.replace(
        model, vit_img_size=32, mp_pixel_shuffle_factor=2, lm_vocab_size=320
    )
    defaults = dict(
        data=data,
        tokens_per_batch=600,
        look_ahead=32,
        workers=0,
        questions_per_image=2,
        augment="shift",
    )
    defaults |= dict(curriculum="", epochs=2.0)
    train = dataclasses.replace(train, **{**defaults, **changes})
    text = TextProcessor(tokenizer, model.prompt, model.image_tokens, train.turns)
    load = SampleLoader(load_source(data, "train"), model, train, text)
    return PackedStream(
        load, measure_budget(load, train), states or initial_states(max(train.workers, 1))
    )


def fingerprints(batches) -> list[tuple]:
    return [
        (
            b.packed.names,
            b.packed.images.sum().item(),
            b.packed.input_ids.tolist(),
            b.packed.labels.tolist(),
        )
        for b in batches
    ]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_example_once_per_epoch(tokenizer, workers):
    batches = list(loader(stream_of(tokenizer, workers=workers)))
    names = [name for batch in batches for name in batch.packed.names]
    assert len(names) == 512 and len(set(names)) == 256
    assert sum(batch.consumed for batch in batches) == 512


@pytest.mark.parametrize(("workers", "shards"), [(0, 1), (1, 1), (2, 2), (0, 3), (3, 3)])
def test_a_resumed_stream_continues_to_the_end_with_the_same_batches(tokenizer, workers, shards):
    def make(states):
        return stream_of(tokenizer, states=states, workers=workers)

    whole = list(loader(make(initial_states(shards))))
    for stop in (1, 4, len(whole) - 2):
        states = initial_states(shards)
        for batch in whole[:stop]:
            states = advance(states, batch)
        states = json.loads(json.dumps(states))
        assert fingerprints(loader(make(states))) == fingerprints(whole[stop:])


def test_questions_and_augmentation_differ_between_epochs(tokenizer):
    load = stream_of(tokenizer).load
    index = next(i for i in range(20) if len(load.source[i].turns) == 3)
    size = len(load.source)
    positions = [position for position in range(8 * size) if load.index(position) == index]
    assert [position // size for position in positions] == list(range(8))
    passes = [load(position) for position in positions]
    assert all(len(sample.documents) == 2 for sample in passes)
    assert len({sample.images.tobytes() for sample in passes}) > 3
    assert len({tuple(tuple(d.input_ids) for d in sample.documents) for sample in passes}) > 2
    again = load(positions[3])
    assert (again.images == passes[3].images).all()


def test_a_curriculum_asks_only_what_it_names_and_counts_every_example(tokenizer):
    def questions(batch):
        ids = batch.packed.input_ids.tolist()
        starts = batch.packed.cu_seqlens.tolist()[: batch.packed.n_documents + 1]
        return [tokenizer.base.decode(ids[a:b]) for a, b in itertools.pairwise(starts)]

    stream = stream_of(
        tokenizer, curriculum="in the upper half", curriculum_share=0.5, questions_per_image=0
    )
    batches = list(loader(stream))
    assert sum(batch.consumed for batch in batches) == 512
    passed_over = sum(batch.passed_over for batch in batches)
    assert passed_over == sum(len(stream.load.source[i].turns) < 3 for i in range(256)) > 0
    assert all("in the upper half" in question for question in questions(batches[0]))
    assert any("what color" in question for question in questions(batches[-1]))


def test_packing_fills_the_budget_on_easy_vqa():
    model, train = preset("tiny")
    tokenizer = Tokenizer.train(texts(EasyVQA("train"), model.prompt), model.lm_vocab_size)
    train = dataclasses.replace(train, workers=0, curriculum="", epochs=1.0)
    text = TextProcessor(tokenizer, model.prompt, model.image_tokens, train.turns)
    load = SampleLoader(EasyVQA("train"), model, train, text)
    budget = measure_budget(load, train)
    batches = list(loader(PackedStream(load, budget, initial_states(1))))
    filled = sum(b.packed.n_tokens for b in batches[:-2]) / (len(batches[:-2]) * budget.tokens)
    images = sum(b.packed.n_images for b in batches[:-2]) / (len(batches[:-2]) * budget.images)
    assert filled >= 0.97, f"{filled:.2%} of the token budget"
    assert images >= 0.9, f"{images:.2%} of the image budget"
    assert sum(b.packed.n_samples for b in batches) == 4000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(labels_per_batch=1),
            "no example fits the budgets. The first: synthetic/train/.*labelled tokens",
        ),
        (
            dict(max_seqlen=4, documents_per_batch=900),
            "no example fits the budgets.*tokens in one document",
        ),
        (dict(tokens_per_batch=5), "smaller than one sample"),
        (dict(max_seqlen=9999), "lm-max-position-embeddings 512"),
        (dict(images_per_batch=-1), "images"),
    ],
)
def test_budgets_that_nothing_fits_are_refused_with_a_reason(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        stream_of(tokenizer, **changes)


def test_data_without_answers_or_readable_images_is_refused(tokenizer, tmp_path):
    write_jsonl(tmp_path, [{"conversations": talk("a", "")}] * 3)
    with pytest.raises(ValueError, match="no answer in any example"):
        stream_of(tokenizer, data=f"jsonl:{tmp_path}")
    write_jsonl(tmp_path, [{"image": "gone.png", "conversations": talk("a", "b")}] * 3)
    with pytest.raises(ValueError, match=r"no example could be read. The first: .*gone\.png"):
        stream_of(tokenizer, data=f"jsonl:{tmp_path}")


def test_trimming_and_pinning_change_nothing_else(tokenizer):
    packed = next(iter(loader(stream_of(tokenizer)))).packed
    trimmed = packed.trimmed()
    assert len(trimmed.input_ids) == packed.n_tokens and len(trimmed.labels) == packed.n_labels
    assert len(trimmed.images) == packed.n_images and trimmed.cu_seqlens[-1] == packed.n_tokens
    assert trimmed.max_seqlen == trimmed.cu_seqlens.diff().max() <= packed.max_seqlen
    assert trimmed.names == packed.names and torch.equal(
        trimmed.images, packed.images[: packed.n_images]
    )


def test_a_stream_can_be_sent_to_workers_that_are_not_forked(tokenizer):
    stream = stream_of(tokenizer)
    again = pickle.loads(pickle.dumps(stream))
    assert fingerprints(itertools.islice(again, 3)) == fingerprints(itertools.islice(stream, 3))


def test_batches_are_the_declared_types(tokenizer):
    batch = next(iter(loader(stream_of(tokenizer)))).packed
    types = {
        f.name: getattr(batch, f.name).dtype
        for f in dataclasses.fields(batch)
        if torch.is_tensor(getattr(batch, f.name))
    }
    assert types == {
        "input_ids": torch.int64,
        "position_ids": torch.int32,
        "cu_seqlens": torch.int32,
        "images": torch.uint8,
        "image_rows": torch.int32,
        "label_index": torch.int64,
        "labels": torch.int64,
    }
