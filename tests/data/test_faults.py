"""Faults in data: corrupt images and malformed records are named, and change nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data import prepare
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.example import Source, Subset
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer
from nanovlm_fast.data.sources.synthetic import Synthetic
from nanovlm_fast.data.stream import PackedStream, StreamBatch, initial_states
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.presets import preset
from nanovlm_fast.reporting.metrics import read_metrics
from tests.support.pictures import cauldron, encoded, texts
from tests.support.runs import lines, losses, train

COUNT = 500
SIZES = "--vit-img-size 32 --mp-pixel-shuffle-factor 2"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # of the worker processes


def order(count: int, epoch: int = 0, seed: int = TrainConfig.seed) -> np.ndarray:
    """The indices of the examples in the order in which a run with that random seed meets them."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def corrupt_images(whole: bytes) -> dict[str, bytes]:
    """1% of the images: file name -> content."""
    bomb = Image.new("1", (9_500, 9_500))
    return {
        "truncated.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "zeros.jpg": bytes(5000),
        "text.png": b"a text that was named as an image",
        "bomb.png": encoded(bomb, "PNG"),
    }


def malformed(record: str) -> list[bytes]:
    """1% of the records."""
    return [
        record[:-9].encode(),
        record.encode().replace(b"what", b"wh\xff\xfet"),
        b'{"conversations": ' + b"[" * 100_000,
        json.dumps({"image": "0.png", "conversation": "renamed"}).encode(),
        json.dumps({**json.loads(record), "image": "../secret.png"}).encode(),
    ]


def write_records(folder: Path, bad: list[int]) -> list[str]:
    """Write COUNT records in LLaVA's format, with faults in those of `bad`.

    Returns what names each fault.
    """
    folder.mkdir()
    source, records, named = Synthetic("train", 32), [], []
    for i in range(COUNT):
        example = source[i % len(source)]
        example.images[0].save(folder / f"{i}.png")
        values = [value for turn in example.turns for value in turn]
        talk = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
        records.append(json.dumps({"image": f"{i}.png", "conversations": talk}).encode())
    images = corrupt_images((folder / "0.png").read_bytes())
    for i, (name, content) in zip(bad, images.items(), strict=False):
        (folder / name).write_bytes(content)
        records[i] = json.dumps({**json.loads(records[i]), "image": name}).encode()
        named.append(name)
    for i, line in zip(bad[len(images) :], malformed(records[0].decode()), strict=True):
        records[i] = line
        named.append(f"train.jsonl:{i + 1}:")
    (folder / "train.jsonl").write_bytes(b"\n".join(records) + b"\n")
    return named


@pytest.fixture
def faulty(tmp_path) -> tuple[Path, list[int], list[str]]:
    """(folder, the bad records, what names them). All come in the first 400 of the first epoch."""
    bad = [int(i) for i in order(COUNT)[np.random.default_rng(0).permutation(400)[:10]]]
    return tmp_path / "data", bad, write_records(tmp_path / "data", bad)


def test_a_run_on_faulty_data_finishes_and_names_each_fault_once(faulty, tmp_path):
    folder, bad, named = faulty
    run = tmp_path / "run"
    (folder / "test.jsonl").write_bytes(
        b"\n".join((folder / "train.jsonl").read_bytes().splitlines()[:2])
    )
    result = train(run, f"--data jsonl:{folder} --val-samples 0 --epochs 2 --workers 2")
    assert result.returncode == 0, result.stderr
    skipped = [
        line for line in result.stdout.splitlines() if line.startswith("skipped, unreadable: ")
    ]
    noted = [line["skipped"] for line in read_metrics(run) if "skipped" in line]
    state = json.loads((run / "last" / "state.json").read_text())
    for said in (skipped, noted, state["bad"].values()):
        assert len(said) == 10
        for name in named:
            assert len([line for line in said if name in line]) == 1, name
    assert sorted(map(int, state["bad"])) == sorted(bad)
    assert state["examples"] == 2 * COUNT and "10 unreadable, 0 too long" in result.stdout
    assert json.loads((run / "result.json").read_text())["bad"] == state["bad"]


@pytest.mark.slow
def test_the_losses_of_the_rest_are_those_of_a_run_without_the_faults(faulty, tmp_path):
    """Bit for bit: the second run reads the good records alone, arranged to come in turn."""
    folder, bad, _ = faulty
    records = (folder / "train.jsonl").read_bytes().splitlines()
    met = [records[i] for i in order(COUNT) if i not in bad]
    arranged: list[bytes] = [b""] * len(met)
    for record, place in zip(met, order(len(met)), strict=True):
        arranged[place] = record
    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "train.jsonl").write_bytes(b"\n".join(arranged))
    for record in arranged:
        (clean / (name := json.loads(record)["image"])).write_bytes((folder / name).read_bytes())
    options = "--val-samples 0 --no-final-eval --workers 0 --max-steps 30"
    for data, more in ((folder, ""), (clean, f"--lm-tokenizer {tmp_path}/data-run")):
        result = train(tmp_path / f"{data.name}-run", f"--data jsonl:{data} {options} {more}")
        assert result.returncode == 0, result.stderr
    ours, theirs = (tmp_path / f"{name}-run" for name in ("data", "clean"))
    (shard,) = json.loads((ours / "last" / "state.json").read_text())["stream"]
    assert 400 < shard["position"] < COUNT, (
        "all faults are met, and no second epoch, whose order is another"
    )
    assert len([line for line in lines(ours) if "skipped" in line]) == 10
    assert losses(ours) == losses(theirs) and len(losses(ours)) == 30


# ---- batch for batch, over whole epochs


class WithoutSome(SampleLoader):
    """The examples of `indices` only, in the order in which a run over all `count` meets them."""

    def __init__(self, loader: SampleLoader, indices: np.ndarray):
        super().__init__(Subset(loader.source, indices), loader.model, loader.train, loader.text)
        self.places, self.count = (
            {int(index): place for place, index in enumerate(indices)},
            len(loader.source),
        )

    def order(self, epoch: int) -> np.ndarray:
        met = order(self.count, epoch, self.train.seed)
        return np.array([self.places[int(index)] for index in met if int(index) in self.places])


def loader_over(source: Source) -> SampleLoader:
    model, config = preset("tiny")
    model = dataclasses.replace(model, vit_img_size=32, mp_pixel_shuffle_factor=2)
    changes = dict(
        tokens_per_batch=700, workers=0, epochs=2.0, curriculum="", augment="none", look_ahead=32
    )
    text = TextProcessor(
        make_tokenizer(model, source), model.prompt, model.image_tokens, config.turns
    )
    return SampleLoader(source, model, dataclasses.replace(config, **changes), text)


def batches_of(load: SampleLoader) -> Iterator[StreamBatch]:
    return iter(PackedStream(load, measure_budget(load, load.train), initial_states(1)))


def assert_same_batches(ours: SampleLoader, theirs: SampleLoader) -> list[StreamBatch]:
    seen = [list(batches_of(load)) for load in (ours, theirs)]
    assert len(seen[0]) == len(seen[1]) > 10
    for one, other in zip(*seen, strict=True):
        for field in dataclasses.fields(one.packed):
            a, b = getattr(one.packed, field.name), getattr(other.packed, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    return seen[0]


def test_the_batches_of_the_rest_are_those_without_the_faults(faulty):
    folder, bad, _ = faulty
    load = loader_over(load_source(f"jsonl:{folder}", "train"))
    good = np.setdiff1d(np.arange(COUNT), bad)
    batches = assert_same_batches(load, WithoutSome(load, good))
    assert {i for batch in batches for i in batch.bad} == set(bad)
    assert sum(len(batch.bad) for batch in batches) == 2 * len(bad), "each epoch"


@pytest.fixture
def rows(tmp_path) -> tuple[Path, list[int]]:
    """200 rows of the Cauldron's schema, two with a corrupt image and two malformed."""
    source, rows = Synthetic("train", 32), []
    for i in range(200):
        rows.append(([encoded(source[i].images[0], "PNG")], texts(*source[i].turns)))
    rows[20] = ([rows[20][0][0][:60]], rows[20][1])
    rows[70] = ([b"no image"], rows[70][1])
    rows[130] = (rows[130][0], [])
    rows[199] = ([None], rows[199][1])
    (tmp_path / "rows").mkdir()
    cauldron(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    return tmp_path / "rows", [20, 70, 130, 199]


def test_a_faulty_parquet_shard_trains_and_is_prepared_without_its_faults(rows, tmp_path, capsys):
    folder, bad = rows
    run, out = tmp_path / "run", tmp_path / "prepared"
    result = train(run, f"--data {folder} --val-samples 0 --epochs 1 --workers 0 --no-final-eval")
    assert result.returncode == 0, result.stderr
    skipped = [line for line in result.stdout.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 4 and "4 unreadable, 0 too long" in result.stdout
    assert (
        prepare.main(f"--data {folder} --out {out} --workers 0 --shard-samples 64 {SIZES}".split())
        == 0
    )
    prepared = "".join(capsys.readouterr())
    for i in bad:
        assert len([line for line in skipped if f"rows/{i}: " in line]) == 1
        assert prepared.count(f"skipped, unreadable: rows/{i}: ") == 1
    assert json.loads((out / "manifest.json").read_text())["skipped"] == 4
    load = loader_over(load_source(str(folder), "train"))
    good = np.setdiff1d(np.arange(200), bad)
    assert_same_batches(load, WithoutSome(load, good))
    alone = SampleLoader(Subset(load.source, good), load.model, load.train, load.text)
    assert_same_batches(loader_over(load_source(f"prepared:{out}", "train")), alone)
