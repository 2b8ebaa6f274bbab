"""Held out is held out: by picture, whatever its name, and still so when the data has changed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanovlm_fast.cli import parse_config
from nanovlm_fast.data import prepare
from nanovlm_fast.data.sources.easy_vqa import EasyVQA
from nanovlm_fast.data.sources.example import Source
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.sources.synthetic import Synthetic
from nanovlm_fast.data.split import check_curriculum, choose, split_off, split_run
from nanovlm_fast.ranks import World
from tests.support.pictures import cauldron, texts
from tests.support.runs import error_of, train


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number: int) -> bytes:
    """PNG files of nearly the same length, so that the length does not tell them apart."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def record(question: str, *names: str) -> str:
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": f"answer to {question}"}]
    return json.dumps({"image": list(names), "conversations": talk})


def a_line_a_question(folder: Path, pictures: int, questions: int, start: int = 0) -> list[str]:
    """The same picture has two names, and there are as many examples of it as questions."""
    folder.mkdir(exist_ok=True)
    for i in range(start, start + pictures):
        for name in (f"{i}.png", f"copy of {i}.png"):
            (folder / name).write_bytes(picture(i))
    names = [("copy of " if q % 2 else "") for q in range(questions)]
    return [
        record(f"question {q} of {i}?", f"{names[q]}{i}.png")
        for q in range(questions)
        for i in range(start, start + pictures)
    ]


def write(folder: Path, records: list[str]) -> str:
    (folder / "train.jsonl").write_text("\n".join(records) + "\n")
    return f"jsonl:{folder}"


def shown(source: Source) -> set[str]:
    """The digests of all pictures of a source."""
    files = [image for i in range(len(source)) for image in source[i].images]
    contents = [file.read_bytes() if isinstance(file, Path) else bytes(file) for file in files]
    return {hashlib.sha256(content).hexdigest() for content in contents}


# ---- the split


@pytest.mark.parametrize(("source", "seed"), [(EasyVQA, 0), (EasyVQA, 1), (Synthetic, 3)])
def test_where_every_example_has_its_own_picture_the_split_is_as_it_was(source, seed):
    """The committed results depend on it."""
    source = source("train")
    for wanted in (0, 1, 100, 10**6):
        rest, held_out = split_off(source, wanted, seed)
        order = np.random.default_rng(seed).permutation(len(source))
        count = min(wanted, len(source) // 2)
        assert (held_out.indices == np.sort(order[:count])).all() and len(held_out) == count
        assert (rest.indices == np.sort(order[count:])).all()


@pytest.mark.parametrize("seed", range(5))
def test_no_held_out_picture_is_trained_on_under_any_name(tmp_path, seed):
    data = write(tmp_path / "data", a_line_a_question(tmp_path / "data", pictures=12, questions=4))
    rest, held_out = split_off(load_source(data, "train"), 3, seed)
    assert not shown(rest) & shown(held_out)
    assert (len(shown(held_out)), len(held_out), len(rest)) == (3, 12, 36)


def test_pictures_that_an_example_shows_together_stay_together(tmp_path):
    folder = tmp_path / "data"
    records = a_line_a_question(folder, pictures=8, questions=2)
    records += [
        record("which is redder?", "1.png", "copy of 2.png"),
        record("and now?", "2.png", "3.png"),
    ]
    records += [record("a text?")] * 3
    source = load_source(write(folder, records), "train")
    sides = set()
    for seed in range(20):
        rest, held_out = split_off(source, 4, seed)
        assert not shown(rest) & shown(held_out)
        assert len(held_out) <= len(source) // 2
        sides.add(len(held_out))
    assert len(sides) > 2, "pictures in a chain, alone, and texts"


def test_of_large_data_only_files_of_a_held_out_size_are_read(tmp_path):
    folder = tmp_path / "data"
    records = a_line_a_question(folder, pictures=60, questions=2)
    for i in range(60):
        for name in (f"{i}.png", f"copy of {i}.png"):
            (folder / name).write_bytes(picture(i) + bytes(i))
    source = load_source(write(folder, records), "train")
    pictures, read = source.pictures(), []
    content = pictures.content
    pictures.content = lambda file: read.append(file) or content(file)
    held_out, groups = choose(source, 5, 0, pictures)
    assert (groups, len(held_out)) == (5, 10) and 10 <= len(read) <= 30


def test_what_cannot_be_read_is_nobodys_double(tmp_path):
    folder = tmp_path / "data"
    records = a_line_a_question(folder, pictures=3, questions=2)
    os.mkfifo(folder / "pipe.png")
    names = ("gone.png", "pipe.png", "x\0.png", "../out.png")
    records += [record(f"{i}?", name) for i, name in enumerate(names)]
    data = write(folder, [*records, "{no json"])
    for seed in range(4):
        _, config = parse_config(["--data", data, "--val-samples", "4", "--seed", str(seed)])
        split = split_run(load_source(data, "train"), config, World(), None)
        assert len(split.train) + len(split.held_out) == 11 and len(split.held_out) >= 4


@pytest.mark.parametrize("form", ["parquet", "prepared"])
def test_rows_that_share_a_picture_are_not_split(tmp_path, form):
    (tmp_path / "rows").mkdir()
    rows = [([picture(i % 10)], texts((f"question {i}?", "yes"))) for i in range(30)]
    rows += [([], texts(("text?", "yes"))), ([picture(3), picture(4)], texts(("both?", "yes")))]
    cauldron(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    data = str(tmp_path / "rows")
    if form == "prepared":
        options = "--workers 0 --shard-samples 7 --vit-img-size 16 --vit-patch-size 4"
        assert prepare.main(f"--data {data} --out {tmp_path}/out {options}".split()) == 0
        data = f"prepared:{tmp_path}/out"
    source = load_source(data, "train")
    for seed in range(4):
        rest, held_out = split_off(source, 4, seed)
        assert len(rest) + len(held_out) == 32 and 3 <= len(held_out) <= 16
        assert not shown(rest) & shown(held_out)


def test_one_picture_for_all_cannot_be_held_out(tmp_path):
    (tmp_path / "data").mkdir()
    records = a_line_a_question(tmp_path / "data", pictures=1, questions=6)
    _, config = parse_config(["--data", write(tmp_path / "data", records), "--val-samples", "5"])
    split = split_run(load_source(config.data, "train"), config, World(), None)
    assert len(split.held_out) == 0 and len(split.train) == 6
    assert "--val-samples 5: only 0 can be held out" in split.lines[0]


def test_fewer_than_asked_and_what_is_held_out_are_said(tmp_path):
    records = a_line_a_question(tmp_path / "data", pictures=10, questions=4)
    _, config = parse_config(["--data", write(tmp_path / "data", records)])
    split = split_run(load_source(config.data, "train"), config, World(), None)
    said = "--val-samples 100: only 5 can be held out (at most half of the 40 examples"
    assert split.lines[0].startswith(said)
    assert re.search(r"training on 20 of 40 examples, held out: \d+ pictures in 20", split.lines[1])


# ---- the curriculum


@pytest.mark.parametrize(("asked", "turns", "fits"), [
    ("upper half", "independent", True), ("upper half", "first", False),
    ("what shape", "independent", False), ("what color", "first", True), ("", "independent", True),
])  # fmt: skip
def test_a_curriculum_that_matches_nothing_is_refused(asked, turns, fits):
    options = ["--data", "synthetic:32", "--curriculum", asked, "--turns", turns]
    _, config = parse_config(options)
    if fits:
        check_curriculum(Synthetic("train"), config)
        return
    said = f"--curriculum '{asked}': no question of --data synthetic:32"
    with pytest.raises(ValueError, match=said):
        check_curriculum(Synthetic("train"), config)


# ---- what a checkpoint keeps


def of(config, state=None):
    return split_run(load_source(config.data, "train"), config, World(), state)


def test_fingerprints_change_with_the_content_and_not_with_the_place(tmp_path):
    def rows(answer: str) -> list:
        shown = [([picture(i)], texts((f"{i}?", "no"))) for i in range(20)]
        return [*shown, ([], texts(("x?", answer)))]

    found = {}
    for name, made in {
        "a": rows("cat"),
        "b": rows("cat"),
        "c": rows("dog"),
        "d": rows("cat")[:-1],
    }.items():
        (tmp_path / name).mkdir()
        cauldron(made).to_parquet(tmp_path / name / "train.parquet")
        found[name] = load_source(str(tmp_path / name), "train").fingerprint
    assert found["a"] == found["b"] and len(set(found.values())) == 3
    cauldron(rows("cat")).save_to_disk(tmp_path / "disk", num_shards=3)
    assert load_source(str(tmp_path / "disk"), "train").fingerprint == found["a"]
    options = "--workers 0 --vit-img-size 32 --mp-pixel-shuffle-factor 2"
    for name in ("a", "c"):
        places = f"--data {tmp_path}/{name} --out {tmp_path}/out-{name}"
        assert prepare.main(f"{places} {options}".split()) == 0
    names = [f"prepared:{tmp_path}/out-{name}" for name in ("a", "c")]
    names += ["easy_vqa", "synthetic", "synthetic:32"]
    assert len({load_source(name, "train").fingerprint for name in names}) == 5


@pytest.mark.parametrize("damage", [7, {}, {"examples": 48}, "held_out", "marks"])
def test_a_damaged_record_is_one_line(tmp_path, damage):
    _, config = parse_config(["--data", "synthetic:32"])
    kept = of(config).record
    damage = {**kept, damage: [10**9, -1]} if isinstance(damage, str) else damage
    with pytest.raises(ValueError, match=r"checkpoint's state\.json is damaged"):
        of(config, {"data": damage})


def test_a_resume_on_the_same_data_takes_the_same_split_whatever_the_pictures_are_by_now(tmp_path):
    folder = tmp_path / "data"
    data = write(folder, a_line_a_question(folder, 10, 2))
    _, config = parse_config(["--data", data, "--val-samples", "3"])
    first = of(config)
    for i in range(10):
        (folder / f"{i}.png").write_bytes(picture(99))
    again = of(config, {"data": json.loads(json.dumps(first.record))})
    assert again.record == first.record and (again.held_out.indices == first.held_out.indices).all()


CHANGES = ["grown", "other answers", "records in another order", "pictures renamed"]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_is_refused_or_keeps_held_out_what_was(tmp_path, change):
    folder = tmp_path / "data"
    records = [*a_line_a_question(folder, 10, 4), *(record(f"text {i}?") for i in range(8))]
    options = ["--data", write(folder, records), "--val-samples", "6"]
    _, config = parse_config(options)
    before = of(config)
    held, said = (
        shown(before.held_out),
        {str(before.held_out[i].turns) for i in range(len(before.held_out))},
    )
    if change == "grown":
        more = a_line_a_question(folder, 10, 1, start=50)
        records = more + records + a_line_a_question(folder, 10, 5)[-10:]
    elif change == "other answers":
        records = [line.replace("answer to question", "another to question") for line in records]
    elif change == "records in another order":
        records = records[::-1]
    else:
        for file in [*folder.glob("*.png")]:
            file.rename(folder / f"new {file.name}")
        records = [line.replace('["', '["new ') for line in records]
    write(folder, records)
    state = {"data": before.record}
    refused = r"is not what the run was trained on: .*became .*--data-changed"
    with pytest.raises(ValueError, match=refused) as error:
        of(config, state)
    assert ("48 examples became 68" in str(error.value)) == (change == "grown")
    _, config = parse_config([*options, "--data-changed"])
    after = of(config, state)
    assert shown(after.held_out) == held and not shown(after.train) & held
    assert not said & {str(after.train[i].turns) for i in range(len(after.train))}
    assert after.record["examples"] == len(records)
    with pytest.raises(ValueError, match="48 examples became 4"):
        write(folder, records[:4])
        of(parse_config(options)[1], state)


def test_a_run_on_changed_data_is_refused_goes_on_if_told_and_old_checkpoints_go_on(tmp_path):
    folder, run = tmp_path / "data", tmp_path / "run"
    records = a_line_a_question(folder, 10, 4)
    data = write(folder, records)
    common = f"--data {data} --workers 0 --no-final-eval --val-samples 2"
    result = train(run, f"{common} --max-steps 3")
    assert result.returncode == 0, result.stderr
    assert "training on 32 of 40 examples, held out: 2 pictures in 8" in result.stdout
    write(folder, records + a_line_a_question(folder, 5, 4, start=20))
    before = (run / "last" / "state.json").read_bytes()
    error = error_of(train(run, f"{common} --max-steps 5 --resume"))
    assert "40 examples became 60, content" in error and "--data-changed" in error
    assert (run / "last" / "state.json").read_bytes() == before
    result = train(run, f"{common} --max-steps 5 --resume --data-changed")
    assert result.returncode == 0, result.stderr
    assert "training on 52 of 60 examples, held out: 2 pictures in 8" in result.stdout
    state = json.loads((run / "last" / "state.json").read_text())
    assert state["step"] == 5 and state["data"]["examples"] == 60
    kept = json.loads((run / "config.json").read_text())
    assert not kept["data_changed"], "accepted once, not for ever"
    del state["data"]
    (run / "last" / "state.json").write_text(json.dumps(state))
    result = train(run, f"{common} --max-steps 6 --resume")
    assert result.returncode == 0, result.stderr
    assert "warning: the checkpoint does not say on what data" in result.stdout
