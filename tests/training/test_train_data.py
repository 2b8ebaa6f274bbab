"""train.py on a user's own data set, with the errors that such data contain.

Also what happens when the numbers go wrong.
"""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from nanovlm_fast.reporting.metrics import read_metrics
from nanovlm_fast.weights.folder import newest_checkpoint
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support.runs import CONVERSATION, error_of, lines, losses, train, trainer, write_llava


def test_unreadable_samples_are_skipped_counted_and_named(tmp_path):
    bad = write_llava(tmp_path / "data", good=8)
    corrupt = json.dumps({"image": "corrupt.png", "conversations": CONVERSATION})
    (tmp_path / "data" / "test.jsonl").write_text(
        "\n".join((tmp_path / "data" / "train.jsonl").read_text().splitlines()[:2] + [corrupt])
    )
    result = train(tmp_path / "run", f"--data jsonl:{tmp_path}/data --val-samples 0 --epochs 1")
    assert result.returncode == 0, result.stderr
    skipped = [line for line in result.stdout.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 4
    for name in bad:
        assert len([line for line in skipped if name in line]) == 1, name
        assert (
            len([line for line in lines(tmp_path / "run") if name in line.get("skipped", "")]) == 1
        ), name
    outcome = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (len(outcome["bad"]), outcome["examples"], outcome["seeing"]["questions"]) == (4, 12, 2)
    assert "corrupt.png" in outcome["seeing"]["skipped"][0]
    assert "4 unreadable, 0 too long" in result.stdout


def test_data_without_a_single_image_trains(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    turns = [{"from": "human", "value": "what follows one?"}, {"from": "gpt", "value": "two"}]
    (folder / "train.jsonl").write_text("\n".join([json.dumps({"conversations": turns})] * 40))
    result = train(tmp_path / "run", f"--data jsonl:{folder} --max-steps 60 --tokens-per-batch 128")
    assert result.returncode == 0, result.stderr
    assert "held-out images" in result.stdout and "sees: 100.0%" in result.stdout
    assert losses(tmp_path / "run")[60] < 0.2 * losses(tmp_path / "run")[1]


def test_too_many_unreadable_samples_stop_the_run(tmp_path):
    write_llava(tmp_path / "data", good=8)
    options = (
        f"--data jsonl:{tmp_path}/data --val-samples 0 --no-final-eval --epochs 1 --max-bad-samples"
    )
    assert train(tmp_path / "enough", f"{options} 4").returncode == 0
    error = error_of(train(tmp_path / "run", f"{options} 3"))
    assert "4 unreadable" in error and "--max-bad-samples 3" in error


def test_one_unreadable_sample_counts_once_however_often_it_is_met(tmp_path):
    """A run of 25 epochs over a data set with five bad images does not stop at epoch 21."""
    write_llava(tmp_path / "data", good=8)
    options = (
        f"--data jsonl:{tmp_path}/data --val-samples 0 --no-final-eval --epochs 3 "
        "--max-bad-samples 4"
    )
    result = train(tmp_path / "run", options)
    assert result.returncode == 0, result.stderr


def test_a_sample_over_the_budget_is_skipped_and_named(tmp_path):
    write_llava(tmp_path / "data", good=8)
    file = tmp_path / "data" / "train.jsonl"
    turns = [{**CONVERSATION[0], "value": "word " * 999}, CONVERSATION[1]]
    records = file.read_text().splitlines()[:2] + [json.dumps({"conversations": turns})]
    file.write_text("\n".join(records))
    # neither a test split nor held-out images: there is nothing to evaluate, and that is no error
    result = train(tmp_path / "run", f"--data jsonl:{tmp_path}/data --val-samples 0 --epochs 1")
    (skipped,) = (line for line in result.stdout.splitlines() if line.startswith("skipped"))
    assert "too long" in skipped and "train.jsonl:3" in skipped and "the budget is 512" in skipped
    assert result.returncode == 0, result.stderr
    assert "0 unreadable, 1 too long" in result.stdout


def test_samples_over_the_budget_are_named_a_hundred_times_and_then_counted(loop, tmp_path):
    """The number of lines about samples that are left out is limited.

    The recipe leaves out a part of the Cauldron, and one line per sample would be hundreds of
    thousands of lines.
    """
    subject = trainer(loop, tmp_path, "--max-steps 1 --no-final-eval")
    batch = next(iter(subject.stream))
    for start in (0, 60, 120):
        names = [f"long {i}" for i in range(start, start + 60)]
        subject.journal.note_left_out(dataclasses.replace(batch, bad={}, too_long=names))
        subject.journal.note_skipped()
    named = [line["skipped"] for line in read_metrics(tmp_path)]
    assert named == [f"long {i}" for i in range(100)] and subject.state.too_long == 180


# ---- numbers that go wrong


@pytest.mark.parametrize(
    "rate", ["1e30", "1e39"]
)  # the second option makes the weights themselves overflow in one step
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_a_good_checkpoint(tmp_path, rate):
    run = tmp_path / "run"
    rates = (
        f"--optimizer adamw --lr-projector {rate} --lr-vision {rate} --lr-language {rate} --clip 0"
    )
    result = train(run, f"{rates} --max-steps 20 --warmup 0.5 --save-every 1 --no-final-eval")
    assert result.returncode == 1
    error = error_of(result)
    assert re.search(r"step \d+.*learning rate.*synthetic/train/\d+", error), error
    kept = newest_checkpoint(run)
    assert (str(kept) if kept else "No checkpoint had been written") in error
    assert kept or rate == "1e39"  # where the first step already goes wrong
    if kept is None:
        return
    model, _ = load_pretrained(kept)
    for name, weight in model.state_dict().items():
        assert weight.isfinite().all(), name
