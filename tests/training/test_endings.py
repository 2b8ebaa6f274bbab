"""Runs end: with data that has nothing to give, and workers with the parent that was killed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from bench.reliability import SMALL
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer
from nanovlm_fast.data.stream import PackedStream, advance, initial_states
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.data.workers import loader
from nanovlm_fast.presets import preset
from tests.support.processes import ROOT
from tests.support.runs import start, trainer

GOOD, GONE, MUTE, LONG = "good", "gone", "mute", "long"


def write(folder: Path, kinds: list[str]) -> str:
    """A record of a kind: good, without its picture, without an answer, or too long."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "good.png")
    lines = []
    for i, kind in enumerate(kinds):
        said = "word " * 900 if kind == LONG else "" if kind == MUTE else "two"
        talk = [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": said}]
        image = "gone.png" if kind == GONE else "good.png"
        lines.append(json.dumps({"image": image, "conversations": talk}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder}"


def stream_of(data: str, shards: int, states=None, **changes) -> PackedStream:
    model, config = preset("tiny")
    sizes = dict(vit_img_size=32, mp_pixel_shuffle_factor=2, lm_vocab_size=320)
    model = dataclasses.replace(model, **sizes)
    options = dict(data=data, tokens_per_batch=600, look_ahead=8, workers=0, max_steps=10)
    config = dataclasses.replace(config, **{**options, "curriculum": "", **changes})
    source = load_source(data, "train")
    text = TextProcessor(make_tokenizer(model, source), model.prompt, model.image_tokens)
    load = SampleLoader(source, model, config, text)
    return PackedStream(load, measure_budget(load, config), states or initial_states(shards))


# ---- shards without anything to learn from


@pytest.mark.parametrize("kind", [GONE, MUTE, LONG])
def test_a_shard_with_nothing_to_learn_from_tells_so_and_ends(tmp_path, kind):
    """Shard 1 of 4 has examples 1 and 5."""
    data = write(tmp_path / "data", [GOOD, kind, GOOD, GOOD, GOOD, kind])
    stream = stream_of(data, 4)
    batches = list(stream.shard(stream.states[1]))
    assert 1 <= len(batches) <= 3 and sum(batch.packed.n_labels for batch in batches) == 0
    told = {
        GONE: lambda b: len(b.bad),
        LONG: lambda b: len(set(b.too_long)),
        MUTE: lambda b: b.packed.n_samples,
    }
    assert max(map(told[kind], batches)) >= 2
    again = [next(stream.shard(stream.states[0])) for _ in range(2)]
    assert again[0].packed.n_labels and again[0].packed.names == again[1].packed.names


@pytest.mark.parametrize("workers", [0, 4])
def test_more_shards_than_examples_are_no_shards(tmp_path, workers):
    data = write(tmp_path / "data", [GOOD] * 3)
    stream = stream_of(data, 4, workers=workers, max_steps=0, epochs=2.0)
    batches = list(loader(stream))
    assert sum(batch.consumed for batch in batches) == 6
    states = initial_states(4)
    for batch in batches[:1]:
        states = advance(states, batch)
    rest = stream_of(data, 4, states, max_steps=0, epochs=2.0)
    assert sum(batch.consumed for batch in loader(rest)) == 6 - batches[0].consumed


def test_every_epoch_counts_its_unreadable_examples(tmp_path):
    stream = stream_of(write(tmp_path / "data", [GOOD, GONE, LONG] * 3), 2, max_steps=0, epochs=4.0)
    batches = list(stream)
    assert sum(batch.consumed for batch in batches) == 36
    assert {i for batch in batches for i in batch.bad} == {1, 4, 7}


def test_a_picture_that_vanishes_before_a_resume_is_named_and_passed_over(tmp_path):
    data = write(tmp_path / "data", [GOOD] * 9)
    stream = stream_of(data, 1, tokens_per_batch=60)
    states = advance(stream.states, next(iter(stream)))
    assert states[0]["buffer"]
    other = stream_of(data, 1, states, tokens_per_batch=60)
    (tmp_path / "data" / "good.png").unlink()
    other.load.cache.clear()
    bad = next(iter(other)).bad
    assert bad and all("good.png" in reason for reason in bad.values())


FEW = {
    "3 examples, 4 workers": ([GOOD] * 3, "--workers 4"),
    "1 example, 3 workers": ([GOOD], "--workers 3"),
    "a worker whose pictures are missing": ([GOOD, GONE, GOOD, GOOD], "--workers 4"),
    "a worker whose examples are too long, in the main process": ([GOOD, LONG] * 2, "--workers 0"),
}


@pytest.mark.parametrize("name", FEW)
def test_a_run_of_so_many_steps_ends_whatever_a_worker_has(loop, tmp_path, name):
    kinds, workers = FEW[name]
    data = write(tmp_path / "data", kinds)
    options = f"--data {data} --val-samples 0 --max-steps 4 --tokens-per-batch 128 {workers}"
    trainer(loop, tmp_path / "run", options).train()
    state = json.loads((tmp_path / "run" / "last" / "state.json").read_text())
    assert state["step"] == 4
    assert len(state["bad"]) == kinds.count(GONE)
    assert (state["too_long"] > 0) == (LONG in kinds)


def test_data_that_is_at_its_end_before_max_steps_is_one_clear_error(loop, tmp_path):
    """Its pictures vanish once the run has begun."""
    data = write(tmp_path / "data", [GOOD] * 4)
    subject = trainer(loop, tmp_path / "run", f"--data {data} --val-samples 0 --max-steps 4")
    (tmp_path / "data" / "good.png").unlink()
    subject.stream.load.cache.clear()
    with pytest.raises(
        loop.Stopped,
        match="after step 0 of 4 a whole epoch had nothing to learn from: 4 unreadable",
    ):
        subject.train()


@pytest.mark.slow
def test_a_rank_with_nothing_to_read_waits_for_nobody(tmp_path):
    """All pictures of one of two ranks are missing; then the data changes, and both refuse it."""
    data, out = write(tmp_path / "data", [GOOD, GONE] * 4), tmp_path / "run"
    options = f"--data {data} --max-steps 3 --workers 1 --tokens-per-batch 128"
    process = start(out, 2, [*SMALL, *options.split()])
    try:
        assert process.wait(200) == 0, out.with_suffix(".log").read_text()[-3000:]
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    state = json.loads((out / "last" / "state.json").read_text())
    assert state["step"] == 3 and sorted(state["bad"]) == ["1", "3", "5", "7"]
    write(tmp_path / "data", [GOOD] * 9)
    process = start(out, 2, [*SMALL, *options.split(), "--max-steps", "5", "--resume"])
    assert process.wait(200) == 1
    log = out.with_suffix(".log").read_text()
    refused = re.findall("error: --data .* 8 examples became 9", log)
    assert len(refused) == 2, "the same on every rank"


# ---- workers and the parent that was killed


def descendants(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, found) for each in (child, *descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone_soon(pids: list[int], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


def await_checkpoint(process: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + 200
    while not (out / "last").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(out.with_suffix(".log").read_text()[-3000:])
        time.sleep(0.02)


BUSY = """
import sys, time
from torch.utils.data import DataLoader, IterableDataset
from nanovlm_fast.data.workers import begin_worker

class Endless(IterableDataset):
    def __iter__(self):
        yield 0
        while True:
            sum(range(1000))

loader = iter(DataLoader(Endless(), batch_size=None, num_workers=3, worker_init_fn=begin_worker))
print([next(loader) for _ in range(3)], flush=True)
time.sleep(300)
"""


def test_workers_that_are_busy_end_with_a_parent_that_was_killed():
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUSY]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("[")
    workers = descendants(process.pid)
    assert len(workers) == 3
    process.kill()
    process.wait()
    assert gone_soon(workers)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_outlives_a_run_that_was_killed(tmp_path, ranks):
    """SIGKILL to train.py, or to torchrun, alone."""
    out = tmp_path / "run"
    process = start(out, ranks, [*SMALL, "--max-steps", "100000", "--workers", "2"])
    await_checkpoint(process, out)
    started = descendants(process.pid)
    assert len(started) >= (2 if ranks == 1 else 6)
    process.kill()
    process.wait()
    assert gone_soon(started)


def test_ctrl_c_ends_a_run_whose_worker_has_nothing(tmp_path):
    data, out = write(tmp_path / "data", [GOOD, GONE, GOOD]), tmp_path / "run"
    options = ["--data", data, "--max-steps", "100000", "--workers", "3"]
    process = start(out, 1, [*SMALL, *options])
    await_checkpoint(process, out)
    started = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(60) == 75, out.with_suffix(".log").read_text()
    finally:
        process.kill()
    assert gone_soon(started)


# ---- lengths


@pytest.mark.parametrize("limit", [3, 5, 12])
def test_a_model_with_too_few_positions_names_its_option(loop, tmp_path, limit):
    said = rf"no example fits.* synthetic/train/\d+: .*--lm-max-position-embeddings is {limit}$"
    with pytest.raises(ValueError, match=said):
        trainer(loop, tmp_path / "run", f"--lm-max-position-embeddings {limit}")


def test_more_images_than_there_is_room_for_are_not_called_unreadable(loop, tmp_path, capsys):
    data = write(tmp_path / "data", [GOOD] * 6)
    file = tmp_path / "data" / "train.jsonl"
    record = json.loads(file.read_text().splitlines()[0])
    many = json.dumps({**record, "image": ["good.png"] * 200})
    file.write_text(f"{file.read_text()}\n{many}")
    options = f"--data {data} --max-steps 3 --max-bad-samples 0 --val-samples 0"
    subject = trainer(loop, tmp_path / "run", options)
    subject.train()
    assert subject.state.too_long > 0 and subject.state.bad == {}
    said = r"too long: .*jsonl:7: 200 images take 800 tokens, --lm-max-position-embeddings is 512"
    assert re.search(said, capsys.readouterr().out)


def test_a_held_out_prompt_that_is_too_long_is_not_called_unreadable(loop, tmp_path):
    options = "--lm-max-position-embeddings 16 --max-steps 2 --max-bad-samples 0"
    subject = trainer(loop, tmp_path / "run", options)
    subject.train()
    assert subject.state.too_long > 0 and subject.state.bad == {}
