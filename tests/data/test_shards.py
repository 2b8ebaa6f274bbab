"""Prepared shards hold what decoding gives; a killed `prepare` continues; damage is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanovlm_fast.cli import parse_config
from nanovlm_fast.data import prepare
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer
from nanovlm_fast.data.sources.shards import AGAIN, DamagedShard, Prepared
from nanovlm_fast.data.stream import PackedStream, initial_states
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.data.workers import loader
from tests.support.pictures import cauldron, easy_vqa_rows, pictures, texts
from tests.support.processes import ROOT
from tests.support.runs import error_of, losses, train

SIZES = "--vit-img-size 32 --mp-pixel-shuffle-factor 2"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Thirty rows of the Cauldron's schema.

    They have every kind of picture, no picture or two, and conversations.
    """
    rows = easy_vqa_rows(20)
    rows += [
        ([file], texts(("What?", f"A {name}."), ("Sure?", "yes")))
        for name, file in pictures().items()
    ]
    rows.append(([], texts(("Two and two?", "four"))))
    rows[4] = (rows[4][0] + rows[5][0], rows[4][1])
    (tmp_path / "data").mkdir()
    cauldron(rows).to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path / "data"


def prepared(data: str | Path, out: Path, options: str = "") -> int:
    """Run the command in this process and return its exit code."""
    arguments = f"--data {data} --out {out} --workers 0 --shard-samples 8 {SIZES} {options}"
    return prepare.main(arguments.split())


def samples_of(data: str | Path, options: str = "") -> SampleLoader:
    model, config = parse_config(
        f"--data {data} --augment none --look-ahead 8 {SIZES} {options}".split()
    )
    source = load_source(str(data), "train")
    text = TextProcessor(
        make_tokenizer(model, source), model.prompt, model.image_tokens, config.turns
    )
    return SampleLoader(source, model, config, text)


@pytest.mark.parametrize("turns", ["first", "independent", "chat"])
def test_prepared_samples_are_what_decoding_gives(folder, tmp_path, turns):
    assert prepared(folder, tmp_path / "out", f"--turns {turns}") == 0
    ours, theirs = (samples_of(data, f"--turns {turns}") for data in (tmp_path / "out", folder))
    assert len(ours.source) == len(theirs.source) == 30
    assert ours.text.tokenizer.fingerprint == theirs.text.tokenizer.fingerprint
    for i in range(30):
        got, expected = ours.load(i), theirs.load(i)
        assert got.name == expected.name and (got.images == expected.images).all()
        assert got.images.shape == expected.images.shape and len(got.documents) == len(
            expected.documents
        )
        for a, b in zip(got.documents, expected.documents, strict=True):
            assert a.question == b.question
            for field in ("input_ids", "image_rows", "labels"):
                one, other = getattr(a, field), getattr(b, field)
                assert one.dtype == other.dtype and (one == other).all(), field
        example = theirs.source[i].first() if turns == "first" else theirs.source[i]
        assert ours.source[i].turns == example.turns, "what an evaluation asks"
    assert not ours.cache, "what is mapped from the disk is not copied into memory"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["samples"] == 30 and manifest["fingerprint"] == theirs.source.fingerprint
    assert manifest["tokens"] == sum(theirs.load(i).tokens for i in range(30))
    assert {entry["samples"] for entry in manifest["shards"]} == {8, 6}
    held = {file.name for file in (tmp_path / "out").iterdir() if file.name[:6] != "shard-"}
    assert held == {"manifest.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_gives_the_same_batches(folder, tmp_path, workers):
    prepared(folder, tmp_path / "out")
    streams = []
    for data in (tmp_path / "out", folder):
        load = samples_of(
            data, f"--workers {workers} --tokens-per-batch 700 --epochs 2 --questions-per-image 2"
        )
        streams.append(
            PackedStream(load, measure_budget(load, load.train), initial_states(max(workers, 1)))
        )
    batches = [list(loader(stream)) for stream in streams]
    assert len(batches[0]) == len(batches[1]) > 4
    for ours, theirs in zip(*batches, strict=True):
        assert ours.packed.names == theirs.packed.names
        for field in ("images", "input_ids", "labels", "image_rows", "cu_seqlens"):
            assert (getattr(ours.packed, field) == getattr(theirs.packed, field)).all(), field


def test_unreadable_examples_are_named_counted_and_left_out(tmp_path, capsys):
    rows = easy_vqa_rows(20)
    rows[3], rows[12] = ([b"no image"], rows[3][1]), (rows[12][0], [])
    cauldron(rows).save_to_disk(tmp_path / "data")
    assert prepared(tmp_path / "data", tmp_path / "out", "--max-bad-samples 1") == 1
    said = capsys.readouterr()
    assert "2 unreadable samples are over --max-bad-samples 1" in said.err.splitlines()[-1]
    assert "skipped, unreadable: data/3: image bytes" in said.out + said.err
    with pytest.raises(FileNotFoundError, match="not prepared to its end"):
        Prepared(tmp_path / "out")
    before = (tmp_path / "out" / "shard-00000.arrow").stat().st_ino
    assert prepared(tmp_path / "data", tmp_path / "out", "--max-bad-samples 2") == 0
    assert (tmp_path / "out" / "shard-00000.arrow").stat().st_ino == before, "what was done is kept"
    source = Prepared(tmp_path / "out")
    assert len(source) == 18 and source.manifest["skipped"] == 2
    assert [source[i].name for i in (2, 3, 10, 11)] == ["data/2", "data/4", "data/11", "data/13"]
    assert "data/12" in json.dumps(source.manifest["shards"])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_a_killed_preparation_goes_on_and_leaves_no_process(tmp_path):
    command = [
        sys.executable,
        "-m",
        "nanovlm_fast.data.prepare",
        "--data",
        "easy_vqa",
        "--workers",
        "2",
    ]
    command += ["--shard-samples", "100", "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = subprocess.Popen([*command, str(out)], cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while len(list(out.glob("shard-*.json"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    finally:
        process.kill()
    assert len(workers) >= 2
    assert not (out / "manifest.json").exists(), "it was over before it was killed"
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.1)
    kept = {
        note.with_suffix(".arrow"): note.stat().st_mtime_ns for note in out.glob("shard-*.json")
    }
    inodes = {file: file.stat().st_ino for file in kept}
    assert 3 <= len(kept) < 40
    (out / ".shard-00039.arrow.1").write_text("half a shard")
    again = subprocess.run(
        [*command, str(out)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_ino for file in kept} == inodes, "whole shards are not made again"
    assert prepare.main([*command[3:], str(whole), "--workers", "0"]) == 0
    ours, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (out, whole))
    assert ours == theirs and len(ours["shards"]) == 40
    assert not list(out.glob(".shard-*")) and not list(out.glob("shard-*.json"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("--vit-img-size 48", "vit_img_size 32 and not 48"),
        ("--mp-pixel-shuffle-factor 1", "image_tokens 4 and not 16"),
        ("--turns chat", "turns 'independent' and not 'chat'"),
        ("--lm-vocab-size 300", "another tokenizer"),
    ],
)
def test_a_changed_option_is_refused_by_name(tmp_path, change, name, capsys, monkeypatch):
    out = tmp_path / "out"
    assert prepared("synthetic:32", out) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    if (
        "vocab" in change
    ):  # prepared data brings its tokenizer, so another one must be put in its place
        assert prepared("synthetic:32", tmp_path / "other", change) == 0
        (out / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=rf"out was prepared with {name}"):
        samples_of(f"prepared:{out}", change)
    if "vocab" not in change:
        assert prepared("synthetic:32", out, change) == 1
        error = capsys.readouterr().err
        assert name in error and "--out names another folder" in error
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_prompt_or_data_set_that_changed_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert prepared("synthetic:32", out) == 0
    model, config = parse_config([*SIZES.split(), "--prompt", "Q {question}"])
    source = Prepared(out)
    with pytest.raises(ValueError, match="prepared with prompt 'Question"):
        source.check(model, make_text(make_tokenizer(model, source), model, config.turns), config)
    assert prepared("easy_vqa", out) == 1
    assert "was prepared with data 'synthetic:32' and not 'easy_vqa'" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    assert prepared("synthetic:32", tmp_path / "full") == 1
    assert "holds other files" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("damage", ["cut", "gone", "pixel", "token", "footer"])
def test_a_damaged_shard_is_refused_by_name_and_made_again(tmp_path, damage, capsys):
    out = tmp_path / "out"
    assert prepared("synthetic:32", out) == 0
    shard, sample = out / "shard-00002.arrow", Prepared(out)[2 * 8 + 3]
    whole, pixels = shard.read_bytes(), sample.images.tobytes()
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(whole[:-100])
    else:
        part = {
            "pixel": pixels,
            "token": sample.documents[0].input_ids.astype(np.int32).tobytes(),
            "footer": b"ARROW1",
        }[damage]
        place = whole.rindex(part) + 5
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DamagedShard, match=r"shard-00002\.arrow is (damaged|missing)") as caught:
        [Prepared(out)[i] for i in range(8, 24)]
    assert len(str(caught.value).splitlines()) == 1
    assert prepare.main(["--verify", "--out", str(out)]) == 1
    assert "shard-00002.arrow" in capsys.readouterr().err
    if damage not in ("gone", "cut"):
        shard.unlink()
    assert prepared("synthetic:32", out) == 0 and shard.read_bytes() == whole
    assert prepare.main(["--verify", "--out", str(out)]) == 0
    assert Prepared(out)[19].images.tobytes() == pixels


def test_damage_ends_a_run_with_its_line_also_when_a_worker_meets_it(tmp_path):
    out = tmp_path / "out"
    assert prepared("synthetic:32", out) == 0
    load = samples_of(out, "--workers 1 --tokens-per-batch 700 --epochs 1")
    budget = measure_budget(load, load.train)
    shard, content = out / "shard-00030.arrow", bytearray((out / "shard-00030.arrow").read_bytes())
    content[bytes(content).index(Prepared(out)[30 * 8].images.tobytes())] ^= 1
    shard.write_bytes(bytes(content))
    line = f"{shard} is damaged: row 0 is not what was written. Delete the file and {AGAIN}"
    with pytest.raises(DamagedShard) as caught:
        list(
            loader(
                PackedStream(samples_of(out, "--workers 1 --epochs 1"), budget, initial_states(1))
            )
        )
    assert str(caught.value) == line
    result = train(tmp_path / "run", f"--data prepared:{out} --val-samples 0 --no-final-eval")
    assert error_of(result) == f"error: {line}" == result.stderr.strip()


def test_shards_from_a_streaming_source_are_the_same(folder, tmp_path, capsys):
    assert prepared(folder, tmp_path / "tokenizer") == 0
    options = f"--lm-tokenizer {tmp_path / 'tokenizer'}"
    assert prepared(folder, tmp_path / "random", options) == 0
    assert prepared(folder, tmp_path / "streamed", f"--streaming --workers 1 {options}") == 0
    ours, theirs = (Prepared(tmp_path / name).entries for name in ("streamed", "random"))
    assert ours == theirs
    (tmp_path / "streamed" / "shard-00002.arrow").unlink()
    assert prepared(folder, tmp_path / "streamed", f"--streaming {options}") == 0
    assert Prepared(tmp_path / "streamed").entries == theirs
    assert prepared(folder, tmp_path / "other", "--streaming") == 1
    assert "--lm-tokenizer" in capsys.readouterr().err


def test_training_on_prepared_data_is_training_on_the_data(tmp_path):
    """Every loss is equal; a test split is prepared with it."""
    out, options = (
        tmp_path / "out",
        "--val-samples 0 --max-steps 8 --augment dihedral --no-final-eval",
    )
    assert prepared("synthetic:32", out) == 0
    for data in (f"prepared:{out}", "synthetic:32"):
        result = train(tmp_path / data[:4], f"{options} --data {data}")
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "prep") == losses(tmp_path / "synt")
    with pytest.raises(FileNotFoundError, match="holds no prepared data"):
        load_source(f"prepared:{out}", "test")
    assert prepared("synthetic:32", out / "test", f"--split test --lm-tokenizer {out}") == 0
    test, expected = load_source(str(out), "test"), load_source("synthetic:32", "test")
    assert [test[i].turns for i in range(len(test))] == [expected[i].turns for i in range(64)]


def test_the_disk_is_asked_first(tmp_path, monkeypatch, capsys):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert prepared("synthetic:32", tmp_path / "out") == 1
    assert "GB" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "nothing is left that would refuse another command"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert prepared("synthetic:32", tmp_path / "out", "--vit-img-size 16") == 0


def test_options_of_the_command_are_checked(tmp_path, capsys):
    for options in ("--workers -1", "--shard-samples 0", "--data nosuch", "--split nosuch"):
        assert prepare.main(f"--data synthetic:32 --out {tmp_path}/out {options}".split()) in (1, 2)
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
