"""Streams: shuffled, held out, interrupted and resumed, with no row lost or repeated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources import streamed
from nanovlm_fast.data.sources.example import Example
from nanovlm_fast.data.sources.registry import open_stream
from nanovlm_fast.data.sources.streamed import StreamLost, read_streaming
from nanovlm_fast.data.split import TEXT, begin_again
from nanovlm_fast.data.stream import advance, deal, initial_states
from nanovlm_fast.data.streaming import (
    Begin,
    HeldOut,
    ShuffledRows,
    StreamedStream,
    marks_of,
    split_stream,
)
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.data.workers import loader
from nanovlm_fast.presets import preset
from nanovlm_fast.ranks import World
from nanovlm_fast.runs import RunState
from tests.support.pictures import cauldron, easy_vqa_rows, texts
from tests.support.runs import different_tensors, error_of, lines, losses, train

ROWS = 40
OPTIONS = "--streaming --max-steps 6 --shuffle-buffer 5 --look-ahead 4 --no-final-eval --workers 2"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, rows: list, files: int) -> str:
    folder.mkdir()
    each = -(-len(rows) // files)
    for file in range(files):
        part = cauldron(rows[file * each : (file + 1) * each])
        # Row groups of three, so that most rows are in the middle of one
        part.to_parquet(folder / f"train-{file:05d}-of-{files:05d}.parquet", batch_size=3)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Question: what is it? Answer:", " yes"] * 9, 300)


def stream(data: str, tokenizer: Tokenizer, states: list, **changes) -> StreamedStream:
    model, config = preset("tiny")
    model = dataclasses.replace(model, vit_img_size=32, mp_pixel_shuffle_factor=2)
    options = dict(streaming=True, max_steps=9, val_samples=4, shuffle_buffer=7, look_ahead=5)
    options |= dict(data=data, curriculum="", augment="none", workers=0, tokens_per_batch=1500)
    config = dataclasses.replace(config, **{**options, **changes}).validate()
    split = split_stream(open_stream(data, "train"), config, World(), None)
    text = TextProcessor(tokenizer, model.prompt, model.image_tokens, config.turns)
    load = SampleLoader(split.train, model, config, text)
    held_out = HeldOut(split.record["marks"])
    return StreamedStream(split.rows, load, measure_budget(load, config), states, held_out)


def names(batches) -> list[tuple[str, ...]]:
    return [batch.packed.names for batch in batches]


@pytest.mark.parametrize(("files", "shards"), [(5, 2), (2, 3), (1, 1)])
def test_each_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path, tokenizer, files, shards):
    data = write(tmp_path / "data", easy_vqa_rows(ROWS), files)
    config = stream(data, tokenizer, initial_states(1)).load.train
    epochs: dict[int, list[str]] = {0: [], 1: []}
    for shard in range(shards):
        rows = ShuffledRows(open_stream(data, "train"), config, shard, shards)
        for row, _ in rows.in_order(Begin()):
            if rows.epoch > 1:
                break
            epochs[rows.epoch].append(row.name)
        # The same rows, block by block in another order, each with its position
        shuffled = list(itertools.islice(rows(Begin()), 14))
        in_order = [row.name for row, _ in itertools.islice(rows.in_order(Begin()), 14)]
        assert sorted(position for position, _ in shuffled) == list(range(14))
        for block in (slice(0, 7), slice(7, 14)):
            assert {row.name for _, row in shuffled[block]} == {*in_order[block]}
        assert [row.name for _, row in shuffled] != in_order
    for names_of_epoch in epochs.values():
        assert len(names_of_epoch) == len({*names_of_epoch}) == ROWS
    assert files < 3 or epochs[0] != epochs[1]


def test_a_resumed_stream_goes_on_to_the_sample(tmp_path, tokenizer):
    data = write(tmp_path / "data", easy_vqa_rows(ROWS), 3)
    whole = list(itertools.islice(stream(data, tokenizer, initial_states(2)), 14))
    states = initial_states(2)
    for number, batch in enumerate(whole[:-3], 1):
        states = advance(states, batch)
        kept = json.loads(json.dumps(states))  # as a checkpoint keeps it
        rest = list(itertools.islice(stream(data, tokenizer, kept), 3))
        assert names(rest) == names(whole[number : number + 3]), number
        wanted = whole[number : number + 3]
        for one, other in zip(rest, wanted, strict=True):
            assert (one.packed.input_ids == other.packed.input_ids).all()
            assert (one.packed.images == other.packed.images).all()


def test_workers_and_ranks_share_the_rows(tmp_path, tokenizer):
    data = write(tmp_path / "data", easy_vqa_rows(ROWS), 6)
    alone = list(itertools.islice(stream(data, tokenizer, initial_states(4)), 8))
    shares = [deal(initial_states(4), rank, 2) for rank in range(2)]
    ranks = [
        list(itertools.islice(loader(stream(data, tokenizer, share, workers=2)), 4))
        for share in shares
    ]
    in_turn = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    assert names(in_turn) == names(alone)


def test_what_is_held_out_is_passed_over_wherever_it_is_shown(tmp_path, tokenizer):
    rows = easy_vqa_rows(ROWS)
    rows[25] = (rows[2][0], texts(("another question?", "yes")))  # shows a held-out picture
    rows[30] = ([], texts(("text?", "yes")))
    rows[3] = ([], texts(("text?", "yes")))  # is held out, and row 30 is the same text
    one = stream(write(tmp_path / "data", rows, 1), tokenizer, initial_states(1))
    batches = list(itertools.islice(one, 30))
    seen = {name for batch in batches for name in batch.packed.names}
    assert seen == {f"data/0/{row}" for row in range(4, ROWS) if row not in (25, 30)}
    dropped = sum((Counter(batch.dropped) for batch in batches), Counter())
    assert dropped["held_out"] >= 6
    text = one.rows.kind.example_of("a", dict(images=[], texts=texts(("text?", "yes"))), "")
    assert marks_of(text)[0][0] == TEXT and one.held_out.shows(text)


def test_an_interruption_is_tried_again_from_the_same_row(tmp_path, monkeypatch, capsys):
    """A file ends early, twice, and is whole again."""
    data = write(tmp_path / "data", easy_vqa_rows(ROWS), 1)
    (file,) = (tmp_path / "data").iterdir()
    whole = file.read_bytes()
    rows = open_stream(data, "train")
    wanted = [row.turns for row, _ in rows.read(0)]
    pauses: list[float] = []
    mended = [True]

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2 and mended:
            file.write_bytes(whole)

    monkeypatch.setattr(streamed.time, "sleep", pause)
    reader = open_stream(data, "train").read(0)
    before = [next(reader) for _ in range(10)]
    file.write_bytes(whole[: len(whole) // 4])
    after = list(rows.read(0, before[-1][1]))
    assert [row.turns for row, _ in before + after] == wanted and pauses == [1, 2]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "file 0 after row 10: " in said[0] and "in 2 s" in said[1]

    mended.clear()
    pauses.clear()
    file.write_bytes(whole[: len(whole) // 4])
    with pytest.raises(StreamLost, match=r"file 0 after row 10: .* \(6 attempts; --resume goes on"):
        list(rows.read(0, before[-1][1]))
    assert pauses == [1, 2, 4, 8, 16]

    # As data.prepare reads; here the second file is cut
    mended.append(True)
    pauses.clear()
    data = write(tmp_path / "two", easy_vqa_rows(ROWS), 2)
    file = sorted((tmp_path / "two").iterdir())[1]
    whole = file.read_bytes()
    reader = read_streaming(data, "train")
    first = next(reader)
    file.write_bytes(whole[: len(whole) // 4])
    every = [first, *reader]
    assert [row.turns for row in every] == wanted and pauses == [1, 2]
    assert [row.name for row in every] == [f"two/{number}" for number in range(ROWS)]


def test_a_stream_that_changed_goes_on_if_told_and_holds_out_what_it_did(tmp_path, tokenizer):
    rows = easy_vqa_rows(ROWS + 12)
    before = write(tmp_path / "before", rows[:ROWS], 2)
    changed = [*rows[ROWS:], *rows[:ROWS]]  # twelve new ones in front
    changed[30] = (rows[1][0], texts(("another question?", "yes")))
    after = write(tmp_path / "after", changed, 2)

    def split(data: str, data_changed: bool = False, kept: dict | None = None):
        config = preset("tiny")[1]
        options = dict(data=data, streaming=True, max_steps=9, val_samples=4, curriculum="")
        options |= dict(resume=kept is not None, data_changed=data_changed)
        config = dataclasses.replace(config, **options).validate()
        state = None if kept is None else {"data": kept}
        return split_stream(open_stream(data, "train"), config, World(), state)

    first = split(before)
    kept = json.loads(json.dumps(first.record))
    with pytest.raises(ValueError, match=r"does not begin as it did.*--data-changed reads it from"):
        split(after, kept=kept)
    second = split(after, data_changed=True, kept=kept)
    assert second.lines[0].startswith("--data-changed: content ")
    assert "held out: 5 of its first 52 examples, found again" in second.lines[1]
    shown = {example.images[0] for example in first.held_out}
    assert {example.images[0] for example in second.held_out} == shown
    assert len(second.train) == len(changed) - 5
    assert not shown & {example.images[0] for example in second.train}
    # The next resume takes it from the checkpoint, and needs no word about it
    again = split(after, kept=json.loads(json.dumps(second.record)))
    assert again.record == second.record and len(again.lines) == 1
    assert [e.name for e in again.held_out] == [e.name for e in second.held_out]
    # All of it is read, from its first row on
    state = RunState(examples=1000, stream=[{**initial_states(1)[0], "position": 900}], data=kept)
    begin_again(state, second.record)
    assert state.stream == initial_states(1)
    read = stream(after, tokenizer, state.stream)
    read.held_out = HeldOut(second.record["marks"])
    seen = {name for batch in itertools.islice(read, 40) for name in batch.packed.names}
    held_out = {example.name for example in second.held_out}
    every = {f"after/{file}/{row}" for file in range(2) for row in range(26)}
    assert seen == every - held_out


@pytest.mark.slow
def test_a_run_streams_and_resumes(tmp_path):
    rows = easy_vqa_rows(60)
    rows[20] = ([b"no image"], rows[20][1])
    data = write(tmp_path / "data", rows, 3)
    env = {"HF_HOME": str(tmp_path / "home")}
    options = f"--data {data} {OPTIONS} --deterministic --save-every 2 --warmup 0 --min-lr 1"
    assert train(tmp_path / "whole", options, **env).returncode == 0
    cut = options.replace("--max-steps 6", "--max-steps 4")
    assert train(tmp_path / "run", cut, **env).returncode == 0
    result = train(tmp_path / "run", f"{options} --resume", **env)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run").keys() == losses(tmp_path / "whole").keys()
    said = [line["skipped"] for line in lines(tmp_path / "whole") if "skipped" in line]
    assert all("data/1/0: image bytes" in reason for reason in said)
    assert different_tensors(tmp_path / "run", tmp_path / "whole") == []


def test_what_cannot_be_streamed_is_one_line(tmp_path):
    assert "give --max-steps" in error_of(train(tmp_path / "run", "--streaming"))
    options = "--streaming --max-steps 2"
    assert "--streaming reads a hub name" in error_of(train(tmp_path / "run", options))


def test_pictures_that_cannot_be_read_are_not_held_out_with_one_that_cannot(tmp_path):
    """Nor is a pipe waited for, which nobody may ever write to."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    names = ("missing", "pipe", "empty")
    unreadable = [Example(name, [tmp_path / name], [("q", name)]) for name in names]
    assert [marks_of(example) for example in unreadable] == [[]] * 3
    readable = Example("both", [tmp_path / "missing", b"picture"], [("q", "a")])
    held_out = HeldOut([*marks_of(readable), *marks_of(unreadable[0])])
    assert held_out.shows(readable)
    assert not any(held_out.shows(example) for example in unreadable)
