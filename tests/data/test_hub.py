"""Data sets that `datasets` reads: the Cauldron's schema and MMStar, from local folders.

And the error where the hub cannot be reached. Folders are made by `datasets` itself and read by the
same call that reads the hub.
"""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from nanovlm_fast.data.images import BadImage, load_image
from nanovlm_fast.data.sources.cauldron import ALL45, CAULDRON, configurations
from nanovlm_fast.data.sources.mmstar import MMStar
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.sources.streamed import read_streaming
from tests.support import forks
from tests.support.pictures import (
    cauldron,
    easy_vqa_rows,
    encoded,
    mmstar,
    photograph,
    pictures,
    texts,
)
from tests.support.runs import lines, train

TURNS = (("What is it?", "A portrait."), ("Of whom?", "Grace Hopper."))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` puts what it converts to Arrow into a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save(data, folder, form: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        data.to_parquet(folder / "train-00000-of-00001.parquet")
    else:
        data.save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("form", ["parquet", "disk"])
def test_every_kind_of_picture_arrives_as_its_file(tmp_path, form):
    files = pictures()
    source = load_source(
        save(cauldron([([file], texts(*TURNS)) for file in files.values()]), tmp_path, form),
        "train",
    )
    assert len(source) == len(files)
    whole = load_image(photograph(), 32).astype(int)
    for i, (name, file) in enumerate(files.items()):
        example = source[i]
        assert (example.images, example.turns) == ([file], list(TURNS)), name
        pixels = load_image(example.images[0], 32)
        if name == "dot":
            assert (pixels == pixels[:, :1, :1]).all()
            continue
        expected = whole.mean(0) if name == "grey" else whole
        assert np.abs(pixels - expected).mean() < 12, name  # upright, in its colours
    with pytest.raises(IndexError):
        source[len(files)]


def test_bad_images_are_named_when_read_and_not_before(tmp_path):
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    photo = encoded(photograph(), "JPEG")
    rows = [
        [photo],
        [photo[: len(photo) // 2]],
        [b"no image"],
        [bomb],
        [b""],
        [None],
        [],
        [photo, photo],
    ]
    source = load_source(
        save(cauldron([(row, texts(TURNS[0])) for row in rows]), tmp_path / "odd", "parquet"),
        "train",
    )
    assert load_image(source[0].images[0], 16).shape == (3, 16, 16)
    for index, reason in (
        (1, "truncated"),
        (2, "cannot identify"),
        (3, "decompression bomb"),
        (4, "cannot identify"),
    ):
        with pytest.raises(BadImage, match=reason) as caught:
            load_image(source[index].images[0], 16)
        assert "0x" not in str(caught.value), "the same words in every run"
    with pytest.raises(ValueError, match=r"odd/5: .*without its bytes"):
        source[5]
    assert (source[6].images, source[7].images) == ([], [photo, photo])
    assert (source[7].first().images, source[7].first().turns) == ([photo], [TURNS[0]])


def test_configurations_follow_one_another(tmp_path):
    rows = easy_vqa_rows(5)
    save(cauldron(rows[:2]), tmp_path / "shapes", "parquet")
    save(cauldron(rows[2:]), tmp_path / "colours", "disk")
    source = load_source(f"{tmp_path}:shapes,colours", "train")
    assert [source[i].images for i in range(5)] == [images for images, _ in rows]
    assert (
        source[1].name == f"{tmp_path.name}/shapes/1"
        and source[2].name == f"{tmp_path.name}/colours/0"
    )
    assert source[3].turns == [(turn["user"], turn["assistant"]) for turn in rows[3][1]]
    streamed = list(read_streaming(f"{tmp_path}:shapes,colours", "train"))
    assert streamed == [source[i] for i in range(5)]
    assert list(read_streaming(f"{tmp_path}:shapes,colours", "train", skip=3)) == streamed[3:]
    with pytest.raises(FileNotFoundError, match="no split 'test', only: train"):
        load_source(f"{tmp_path}:shapes", "test")
    other = load_source(f"{tmp_path}:colours,shapes", "train")
    assert source.fingerprint != other.fingerprint


def test_the_recipe_names_45_configurations():
    assert len(set(ALL45)) == 45
    assert [config for _, name, config in configurations(f"{CAULDRON}:all45")] == list(ALL45)
    assert configurations("a/b") == [("b", "a/b", None)]


def test_other_columns_are_listed(tmp_path):
    from datasets import Dataset

    folder = save(Dataset.from_dict({"image": ["a"], "question": ["b"]}), tmp_path, "parquet")
    with pytest.raises(ValueError, match=r"no column images, texts; its columns: image, question"):
        load_source(folder, "train")


@pytest.mark.parametrize("turns", [[], [{"user": None, "assistant": "a", "source": "s"}]])
def test_a_row_without_turns_is_named(tmp_path, turns):
    folder = save(cauldron([([], texts(TURNS[0])), ([], turns)]), tmp_path / "some", "disk")
    source = load_source(folder, "train")
    assert source[0].turns == [TURNS[0]]
    with pytest.raises(ValueError, match="some/1: not a record"):
        source[1]


@pytest.mark.parametrize("content", ["nothing", "text", "damaged"])
def test_a_folder_that_is_no_data_set_is_one_line(tmp_path, content):
    if content == "text":
        (tmp_path / "notes.md").write_text("hello")
    if content == "damaged":
        (tmp_path / "train.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(OSError, match=str(tmp_path)) as caught:
        load_source(str(tmp_path), "train")
    assert len(str(caught.value).splitlines()) == 1 and "local copy" not in str(caught.value)


def test_mmstar_is_read_with_its_categories(tmp_path):
    folder = save(
        mmstar([("Which? A: x, B: y", "B", "math"), ("What?", "A", "logical reasoning")]),
        tmp_path,
        "parquet",
    )
    source = MMStar(folder)
    assert (len(source), source[0].turns, source[0].kind) == (
        2,
        [("Which? A: x, B: y", "B")],
        "math",
    )
    assert load_image(source[1].images[0], 16).shape == (3, 16, 16)
    assert load_source(f"mmstar:{folder}", "test")[1].kind == "logical reasoning"


def test_offline_is_said_in_one_line_with_a_way_out(tmp_path):
    begun = time.monotonic()
    for data in (f"{CAULDRON}:all45", "mmstar"):
        options = ["--data", data, "--out", str(tmp_path / "run"), "--lm-tokenizer", "train"]
        result = forks.run("train.py", *options, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
        assert result.returncode == 1
        (line,) = result.stderr.strip().splitlines()
        wanted = "HuggingFaceM4/the_cauldron:ai2d" if data != "mmstar" else "Lin-Chen/MMStar"
        assert (
            line.startswith(f"error: data set {wanted} could not be loaded: ")
            and "A local copy works too" in line
        )
    assert time.monotonic() - begun < 60 and not (tmp_path / "run").exists()


def test_training_reads_a_folder_of_the_cauldrons_schema(tmp_path):
    """Bad rows are named and counted, and the run goes on."""
    rows = easy_vqa_rows(40)
    rows[3] = ([b"no image"], rows[3][1])
    rows[7] = (rows[7][0], [])
    folder = save(cauldron(rows), tmp_path / "data", "parquet")
    options = f"--data {folder} --val-samples 0 --epochs 1 --turns first --no-final-eval"
    result = train(tmp_path / "run", options, HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    skipped = [line["skipped"] for line in lines(tmp_path / "run") if "skipped" in line]
    assert sorted(reason.split(":")[0] for reason in skipped) == ["data/3", "data/7"]
    assert "2 unreadable" in result.stdout


def test_sixteen_million_colours_of_a_photograph_survive_the_way(tmp_path):
    """Nothing is compressed again or converted: the data set holds the bytes of the file."""
    file = encoded(photograph(640, 480), "JPEG", quality=90)
    source = load_source(save(cauldron([([file], texts(TURNS[0]))]), tmp_path, "disk"), "train")
    expected = np.asarray(
        Image.open(io.BytesIO(file)).resize((64, 64), Image.Resampling.BILINEAR)
    ).transpose(2, 0, 1)
    assert (load_image(source[0].images[0], 64) == expected).all()
