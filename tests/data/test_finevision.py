"""FineVision's schema: what is read, what is dropped by its ratings, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.budget import even_draw
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.images import tiles_of
from nanovlm_fast.data.places import absolute_paths
from nanovlm_fast.data.prepare import main as prepare
from nanovlm_fast.data.samples import SampleLoader, TooLong, make_sample, tiles_shown
from nanovlm_fast.data.sources.canvas import COPIES, TEST_SIZES
from nanovlm_fast.data.sources.finevision import RATINGS, finevision_example
from nanovlm_fast.data.sources.registry import is_local, load_source, make_tokenizer
from nanovlm_fast.data.sources.shards import Prepared
from nanovlm_fast.data.stream import PackedStream, initial_states
from nanovlm_fast.evaluate import Examiner, evaluate
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import preset
from nanovlm_fast.training.setup import Run
from tests.support.pictures import encoded, photograph

TALK = [{"user": "What is it?", "assistant": "A cat."}, {"user": "Why?", "assistant": "It purrs."}]
PHOTO = encoded(photograph(), "JPEG")
# (images, texts, relevance, visual dependency) of rows; the other ratings are null
ROWS: list[tuple[Any, Any, Any, Any]] = [
    ([PHOTO], TALK, [5, 4], [1, 3]),
    ([PHOTO, PHOTO], TALK, None, [None, 1]),
    (None, TALK, [1, 1], None),
    ([PHOTO] * 3, TALK, [2, 2], [2, 2]),
    ([PHOTO], TALK, [], None),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, rows: list[tuple[Any, Any, Any, Any]] = ROWS) -> str:
    """A data set of FineVision's columns, two of its ratings, made by `datasets`."""
    from datasets import Dataset, Features, Sequence, Value
    from datasets import Image as ImageFeature

    text = {name: Value("string") for name in ("user", "assistant")}
    ratings = {name: Sequence(Value("int64")) for name in ("relevance", "visual_dependency")}
    features = Features(
        {"images": Sequence(ImageFeature()), "texts": [text], "source": Value("string")}
    )
    features |= {f"{name}_ratings": kind for name, kind in ratings.items()}
    columns = {
        "images": [
            None if row[0] is None else [{"bytes": b, "path": None} for b in row[0]] for row in rows
        ],
        "texts": [row[1] for row in rows],
        "source": ["made"] * len(rows),
        "relevance_ratings": [row[2] for row in rows],
        "visual_dependency_ratings": [row[3] for row in rows],
    }
    folder.mkdir()
    data = Dataset.from_dict(columns, features=Features(features))
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return f"finevision:{folder}"


def small(data: str, **changes: Any) -> SampleLoader:
    model, train = preset("tiny-split")
    train = dataclasses.replace(train, data=data, curriculum="", turns="chat", **changes)
    source = load_source(data, "train")
    tokenizer = make_tokenizer(model, source)
    return SampleLoader(source, model, train, make_text(tokenizer, model, "chat"))


def test_a_row_is_its_images_turns_and_ratings(tmp_path):
    data = write(tmp_path / "rows")
    assert is_local(data) and not is_local("finevision") and not is_local("finevision:a/b")
    assert absolute_paths({"data": data})["data"] == data
    source = load_source(data, "train")
    assert [len(source[i].images) for i in range(len(ROWS))] == [1, 2, 0, 3, 1]
    assert source[0].images == [PHOTO]
    assert source[0].turns == [(turn["user"], turn["assistant"]) for turn in TALK]
    assert source[0].ratings == {"relevance": [5, 4], "visual_dependency": [1, 3]}
    assert source[1].ratings == {"visual_dependency": [None, 1]} and source[4].ratings == {}
    assert source.pictures().group(0) == {0, 1, 3, 4}, "they show the same picture"


def test_no_test_split_is_looked_for_on_the_hub():
    """It would be found out after a download of all of FineVision."""
    with pytest.raises(FileNotFoundError, match="2 has no split 'test', only: train"):
        load_source("finevision", "test")


def test_turns_that_are_rated_too_low_are_dropped_and_counted(tmp_path):
    load = small(write(tmp_path / "rows"), min_rating_visual_dependency=2, min_rating_relevance=2)
    samples = [load.load(i) for i in range(len(ROWS))]
    asked = [[document.question for document in sample.documents] for sample in samples]
    assert asked == [["Why?"], ["What is it?"], [], ["What is it?\nWhy?"], ["What is it?\nWhy?"]]
    dropped = [("visual_dependency",), ("visual_dependency",), ("relevance",) * 2 + ("examples",)]
    assert [sample.dropped for sample in samples] == [*dropped, (), ()]
    stream = PackedStream(load, Budget(2000, 8, 60, 200, 500), initial_states(1))
    batches = list(itertools.islice(stream, 4))
    counted = sum((Counter(batch.dropped) for batch in batches), Counter())
    assert counted["relevance"] == 2 * counted["examples"] > 0
    assert small(str(load.train.data)).load(0).dropped == (), "the default drops none of 1 and more"


def test_what_is_held_out_is_asked_by_the_same_ratings(tmp_path, monkeypatch):
    data = write(tmp_path / "rows")
    monkeypatch.setattr("nanovlm_fast.data.split.choose", lambda *_: ([0, 1], 2))
    options = f"--preset tiny-split --turns chat --data {data} --min-rating-visual-dependency 2"
    options += f" --val-samples 2 --curriculum= --workers 0 --device cpu --out {tmp_path / 'run'}"
    run = Run(*parse_config([*options.split(), "--max-steps", "1"]))
    asked = [[question for question, _ in example.turns] for example in run.val_source]
    assert asked == [["Why?"], ["What is it?"]]


def test_a_draw_of_tiles_takes_no_memory_and_an_empty_one_is_named(tmp_path):
    data = write(tmp_path / "rows")
    drawn = even_draw(small(data))
    assert sorted(len(sample.images) for sample in drawn) == [0, 13, 13, 26, 39]
    assert sum(sample.images.nbytes for sample in drawn) == 0
    rated = write(tmp_path / "rated", ROWS[:1] * 3)
    with pytest.raises(ValueError, match="no example is left with a turn: all are rated too low"):
        even_draw(small(rated, min_rating_visual_dependency=4))


def test_more_images_than_allowed_are_named(tmp_path):
    load = small(write(tmp_path / "rows"), max_images=2)
    with pytest.raises(TooLong, match="rows/3: 3 images, --max-images is 2"):
        load.load(3)
    assert load.load(1).grids == ((3, 4), (3, 4)) and len(load.load(1).images) == 26


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"relevance_ratings": ["good", 1]}, "relevance_ratings: 'good' is not a number"),
        ({"formatting_ratings": [True, 1]}, "formatting_ratings: True is not a number"),
        ({"relevance_ratings": [1]}, "relevance_ratings must be a list with one for each of the 2"),
        ({"visual_dependency_ratings": 3}, "visual_dependency_ratings must be a list"),
        ({"texts": [{"user": None, "assistant": "Hi"}]}, "turn 1 starts with the assistant"),
        ({"texts": [{"assistant": "Hi"}]}, "turn 1 starts with the assistant"),
        ({"texts": [*TALK, {"user": "a", "assistant": 3}]}, "turn 3 must be a text"),
        ({"texts": []}, "texts must hold at least one"),
        ({"texts": None}, "texts must hold at least one"),
        ({"texts": ["What?"]}, "has no attribute"),
        ({"images": [{"bytes": None, "path": "a.png"}]}, "without its bytes"),
        ({"texts": [{"user": "\ud800", "assistant": "a"}]}, "surrogates not allowed"),
    ],
)
def test_a_row_that_is_not_of_the_schema_is_named(change, reason):
    row = {"images": [], "texts": TALK}
    assert len(finevision_example("rows/7", row, None).turns) == 2
    with pytest.raises(ValueError, match=f"rows/7: not a record of FineVision's schema .*{reason}"):
        finevision_example("rows/7", {**row, **change}, None)


def test_a_folder_of_json_names_its_pictures(tmp_path):
    folder = tmp_path / "json"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
    rows = [
        {"images": [name], "texts": TALK, "relevance_ratings": [5, None]}
        for name in ("a.png", "b.png", "../c.png")
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = load_source(f"finevision:{folder}", "train")
    assert source[1].images == [folder / "b.png"]
    assert source.pictures().group(0) == {0, 1}, "the same bytes under two names"
    with pytest.raises(ValueError, match=r"/2: .*image \.\./c.png lies outside"):
        source[2]


def test_preparing_reports_what_it_leaves_out_as_training_does(tmp_path, capsys):
    data = write(tmp_path / "rows", [*ROWS, ROWS[1]])
    options = f"--preset tiny-split --turns chat --max-images 2 --data {data}"
    options += " --min-rating-relevance 2 --min-rating-visual-dependency 2 --shard-samples 2"
    out = tmp_path / "out"
    assert prepare([*options.split(), "--out", str(out), "--workers", "0"]) == 0
    said = capsys.readouterr()
    assert "skipped, too long: rows/3: 3 images, --max-images is 2" in said.out + said.err
    counts = "turns rated too low: relevance 2, visual_dependency 3 left out"
    assert f"0 unreadable, 1 too long, 1 examples without a turn left, {counts}" in said.out
    manifest = Prepared(out).manifest
    assert (manifest["too_long"], manifest["skipped"], len(manifest["shards"])) == (1, 0, 3)
    assert manifest["dropped"] == {"visual_dependency": 3, "relevance": 2, "examples": 1}
    del manifest["shards"][0]["dropped"], manifest["shards"][0]["too_long"]  # of an older version
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / manifest["shards"][1]["file"]).unlink()
    assert prepare([*options.split(), "--out", str(out), "--workers", "0"]) == 0
    assert Prepared(out).manifest["dropped"] == {
        "relevance": 2,
        "examples": 1,
        "visual_dependency": 1,
    }


def test_prepared_tiles_are_those_that_are_made_on_the_fly(tmp_path, capsys):
    data = write(tmp_path / "rows")
    options = (
        f"--preset tiny-split --turns chat --max-images 2 --min-rating-relevance 2 --data {data}"
    )
    out = tmp_path / "out"
    assert prepare([*options.split(), "--out", str(out), "--workers", "0"]) == 0
    fly = small(data, max_images=2, min_rating_relevance=2)
    source = Prepared(out)
    load = SampleLoader(source, fly.model, fly.train, fly.text)
    for index in (0, 1, 4):
        ours, theirs = load.load(index), fly.load(index)
        assert np.array_equal(ours.images, theirs.images)
        for one, other in zip(ours.documents, theirs.documents, strict=True):
            assert np.array_equal(one.input_ids, other.input_ids)
            assert np.array_equal(one.image_rows, other.image_rows)
            assert np.array_equal(one.labels, other.labels)
    assert load.load(2).documents == load.load(3).documents == []  # rated too low, too many images
    # By whole pictures: many of their tiles are plain and alike
    assert source.pictures().group(0) == {0, 1, 4}
    # What an evaluation asks: the grids of the tiles must be known again
    asking = [
        Examiner(
            VisionLanguageModel(fly.model), fly.text.tokenizer, one, "independent", False, None
        )
        for one in (source, fly.source)
    ]
    (ours, questions), (theirs, wanted) = (one.read_questions([0, 1, 4]) for one in asking)
    assert np.array_equal(np.concatenate(ours), np.concatenate(theirs))
    assert len(questions) == len(wanted) == 6
    for one, other in zip(questions, wanted, strict=True):
        assert np.array_equal(one.prompt.input_ids, other.prompt.input_ids)
        assert np.array_equal(one.prompt.image_rows, other.prompt.image_rows)
    first = source[1].first()
    assert len(source[1].images) == 26 and np.array_equal(first.images, source[1].images[:13])
    assert first.grids == [(3, 4)] and first.turns == source[1].turns[:1]
    # Of a worker's memory, 4 x 4 tiles take as much as 16 images
    assert source.manifest["shard_samples"] == 512 // 16
    batches: list[None] = []
    evaluate(asking[0].model, fly.text.tokenizer, source, alive=lambda: batches.append(None))
    assert len(batches) == 2, "of 64 // 16 examples each, and there are 5"
    squares = dataclasses.replace(fly.model, max_img_size=0, resize_to_max_side_len=False)
    with pytest.raises(ValueError, match="rows/0: tiles of prepared data, for models that see"):
        tiles_shown(source[0], squares)
    other = dataclasses.replace(fly.train, min_rating_relevance=1)
    with pytest.raises(ValueError, match="prepared with min_rating_relevance 2 and not None"):
        SampleLoader(source, fly.model, other, fly.text)
    with pytest.raises(ValueError, match="prepared with max_img_size 256 and not None"):
        squares = dataclasses.replace(fly.model, max_img_size=0)
        SampleLoader(source, squares, fly.train, make_text(fly.text.tokenizer, squares, "chat"))
    # Made before the end of an empty last answer had loss
    del source.manifest["processing"]["labels"]
    with pytest.raises(ValueError, match="prepared with labels None and not 'rule 2'"):
        SampleLoader(source, fly.model, fly.train, fly.text)


# ---- easy-VQA on canvases


def cells_of(canvas: Image.Image) -> list[np.ndarray]:
    pixels = np.asarray(canvas)
    rows = [pixels[top : top + 64] for top in range(0, len(pixels), 64)]
    return [row[:, left : left + 64] for row in rows for left in range(0, row.shape[1], 64)]


def drawn(picture: Image.Image | np.ndarray) -> np.ndarray:
    """(h, w, 3): what is drawn on a plain background; empty for nothing."""
    pixels = np.asarray(picture)
    differs = (pixels != pixels[0, 0]).any(2)
    rows = np.nonzero(differs.any(1))[0]
    columns = np.nonzero(differs.any(0))[0]
    if not rows.size:
        return pixels[:0]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_canvases_hold_the_picture_and_copies_count_as_the_same():
    source = load_source("easy_vqa_canvas", "train")
    small_one = load_source("easy_vqa", "train")
    assert len(source) == COPIES["train"] * len(small_one)
    sizes = set()
    for index in range(0, 8000, 401):
        (canvas,) = source[index].images
        sizes.add(canvas.size)
        assert source[index].turns == small_one[index % 4000].turns
        (again,) = source[index].images
        assert np.array_equal(canvas, again), "the same in every worker and epoch"
        wanted = drawn(Image.open(small_one[index % 4000].images[0]).convert("RGB"))
        found = [shown for shown in map(drawn, cells_of(canvas)) if shown.size]
        assert len(found) == 1, "one cell has something on it, and no edge of a cell cuts it"
        assert any(np.array_equal(found[0], one) for one in (wanted, wanted[:, ::-1]))
    assert (64, 64) in sizes and max(max(size) for size in sizes) == 256
    assert source.pictures().group(7) == {7 + 4000 * copy for copy in range(COPIES["train"])}


def test_all_canvases_of_the_test_split_are_large():
    source = load_source("easy_vqa_canvas", "test")
    sizes = {source[index].images[0].size for index in range(60)}
    assert sizes == {(64 * wide, 64 * high) for wide, high in TEST_SIZES}
    assert all(max(size) == 256 for size in sizes)


def test_tiles_rule_out_what_moves_whole_images():
    model, train = preset("tiny-split")
    source = load_source("easy_vqa_canvas", "test")
    text = make_text(make_tokenizer(model, source), model, train.turns)
    sample = make_sample(source[0], model, text)
    assert len(sample.images) == sum(tiles_of(grid, model) for grid in sample.grids)
    shifted = dataclasses.replace(train, augment="shift")
    with pytest.raises(ValueError, match="--augment shift moves and mirrors whole images"):
        SampleLoader(source, model, shifted, text)
    assert all(hasattr(TrainConfig, f"min_rating_{name}") for name in RATINGS)
