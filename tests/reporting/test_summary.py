"""Scores and pictures come after the last step; none ends a run or costs another."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.sources.example import Source
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.registry import texts
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.ranks import World
from nanovlm_fast.reporting import summary
from nanovlm_fast.reporting.journal import Journal
from nanovlm_fast.reporting.pictures import plot_samples
from nanovlm_fast.reporting.summary import score, summarise
from nanovlm_fast.runs import RunState
from nanovlm_fast.weights.card import model_card
from tests.support.runs import CONVERSATION, train
from tests.support.samples import SMALL

WORDS = ["what is it? a cat"] * 9
AWKWARD = [
    "$5 or $x^{$",
    "\\frac{1",
    "a\x00\x07\x1b[31mb\u202e",
    "x" * 10_000,
    "word " * 9_000,
    "日本語 🙂 \ud800",
    "",
    "%s {",
]


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def write_data(folder: Path, **splits: list[list[dict[str, str]] | None]) -> Path:
    """A LLaVA data set with one picture per conversation; None is a record without its picture."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, talks in splits.items():
        records = []
        for i, turns in enumerate(talks):
            name = f"{split}{i}.png"
            if turns:
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / name)
            records.append(json.dumps({"image": name, "conversations": turns or CONVERSATION}))
        (folder / f"{split}.jsonl").write_text("\n".join(records) + "\n")
    return folder


def test_pictures_are_drawn_whatever_the_texts_say(tmp_path):
    image = np.zeros((3, 32, 32), np.uint8)
    samples = [(image, text, other, text) for text in AWKWARD for other in (text, "no")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_samples(tmp_path / "samples.png", samples)
    width, height = Image.open(tmp_path / "samples.png").size
    assert width < 1500 and height < 1200, "no text blows the picture up"


@pytest.fixture
def finish(tmp_path):
    """RUN/result.json and the accuracies that `summarise` gives for a small model."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "accuracy": 0.5}\n')

    def ask(data: Path, **options: Any) -> tuple[dict, dict[str, float]]:
        held_out = JsonLines("train", data)
        model_config = VLMConfig(**{**SMALL, "lm_vocab_size": 300})
        tokenizer = Tokenizer.train(texts(held_out, model_config.prompt), 300)
        state = RunState(step=1, seconds=1.0, examples=1, tokens=1, capacity=2)
        config = TrainConfig(data=f"jsonl:{data}", **options)
        model = VisionLanguageModel(model_config)
        try:
            parts = run, model, tokenizer, held_out, config, state
            found = summarise(*parts, lambda: None)
        finally:
            file = run / "result.json"
            result = json.loads(file.read_text()) if file.exists() else {}
        return result, found

    return ask


GOOD = talk("what is it?", "a cat")


def test_a_test_split_without_one_readable_picture_has_no_score(tmp_path, finish, capsys):
    data = write_data(tmp_path / "data", train=[GOOD], test=[None] * 3)
    result, found = finish(data)
    assert found == {} and result["seeing"]["accuracy"] is None
    assert len(result["seeing"]["skipped"]) == 3
    shown = capsys.readouterr().out
    assert "none of its questions could be asked" in shown and "sees: " not in shown
    assert "3 unreadable" in shown and "test0.png" in shown
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": "jsonl:x"}))
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"step": 1}')
    card = model_card(folder, "nanovlm", VisionLanguageModel(VLMConfig(**SMALL)), "name")
    assert "Measured" not in card


def test_held_out_pictures_that_cannot_be_read_are_no_score_either(tmp_path, capsys):
    held_out = JsonLines("train", write_data(tmp_path / "data", train=[None] * 2))
    tokenizer = Tokenizer.train(texts(held_out, VLMConfig.prompt), 300)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300}))
    state = RunState(step=4)
    assert score(model, tokenizer, held_out, None, TrainConfig(), state, lambda: None) == {}
    assert state.best_step is None and len(state.bad) == 2
    said = "step 4: none of the held-out questions could be asked; left out: 2 unreadable"
    assert said in capsys.readouterr().out


def test_a_question_over_the_context_is_left_out_and_not_unreadable(tmp_path, finish, capsys):
    talks = [GOOD, talk("what? " * 500, "a cat"), GOOD]
    data = write_data(tmp_path / "data", train=talks, test=talks)
    result, found = finish(data)
    assert result["seeing"]["questions"] == 2 and set(found) == {"sees", "blind"}
    assert "1 too long for the model, the first: " in capsys.readouterr().out
    assert Image.open(tmp_path / "run" / "samples.png").size[0] > 500
    held_out = JsonLines("train", data)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300}))
    state = RunState(step=4)
    tokenizer = Tokenizer.train(texts(held_out, VLMConfig.prompt), 300)
    scores = score(model, tokenizer, held_out, None, TrainConfig(), state, lambda: None)
    assert state.best_step == 4 and scores.keys() == {"accuracy"} and state.bad == {}
    assert "of 2 held-out questions; left out: 1 too long for the model" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["plot_curves", "plot_samples", "answer_samples"])
def test_a_picture_that_fails_costs_no_score(tmp_path, finish, capsys, monkeypatch, part):
    def fail(*args, **options):
        raise RuntimeError("something\nwent wrong")

    monkeypatch.setattr(summary, part, fail)
    result, found = finish(write_data(tmp_path / "data", train=[GOOD], test=[GOOD]))
    assert result["seeing"]["questions"] == 1 and set(found) == {"sees", "blind"}
    shown = capsys.readouterr().out
    name = "curves.png" if part == "plot_curves" else "samples.png"
    assert f"warning: no {name}: something went wrong\n" in shown and "sees: " in shown


class Broken(list, Source):
    """A data set with an example that fails in a way that nobody has foreseen."""

    def __getitem__(self, index):
        raise RuntimeError("out of memory")


def test_an_evaluation_that_fails_costs_no_other_score(tmp_path, finish, capsys, monkeypatch):
    data = write_data(tmp_path / "data", train=[GOOD])
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300}))
    tokenizer = Tokenizer.train(WORDS, 300)
    state = RunState(step=4)
    config = TrainConfig(eval="synthetic")
    sources = Broken([1]), JsonLines("train", data)
    scores = score(model, tokenizer, *sources, config, state, lambda: None)
    assert scores.keys() == {"eval"} and scores["eval"]["questions"] == 1 and model.training
    shown = capsys.readouterr().out
    assert "warning: step 4: the held-out images are not scored: out of memory\n" in shown

    monkeypatch.setattr(summary, "test_split", lambda name: Broken([1]))
    assert finish(data) == ({}, {})
    assert "warning: the run is not scored at its end: out of memory" in capsys.readouterr().out


def test_chance_stands_in_the_table_of_multiple_choice_questions(tmp_path, finish, capsys):
    asked = [talk("which? A: a cat, B: a dog", "A"), talk("which? A: 1, B: 2, C: 3, D: 4", "D")]
    data = write_data(tmp_path / "data", train=[GOOD], test=asked)
    result, _ = finish(data)
    assert result["seeing"]["chance"] == result["blind"]["chance"] == 0.375
    shown = capsys.readouterr().out
    assert " · chance 37.5%\n" in shown and "of 2 questions, chance 37.5%" in shown


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_an_unwritten_file_is_judged_when_the_scores_are_safe(tmp_path, finish, capsys, policy):
    for name in ("curves.png", "samples.png"):
        (tmp_path / "run" / name).mkdir()  # has the effect of a full disk
    data = write_data(tmp_path / "data", train=[GOOD], test=[GOOD])
    if policy == "stop":
        with pytest.raises(OSError, match=r"curves\.png could not be written"):
            finish(data, on_save_error=policy)
    else:
        finish(data, on_save_error=policy)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["seeing"]["questions"] == 1
    shown = capsys.readouterr().out
    assert "sees: " in shown and shown.count("could not be written") == 2


def test_a_run_ends_well_whatever_its_test_split_holds(tmp_path):
    talks = [talk(f"what is {i}?", "a $cat$ \\frac{ $") for i in range(8)]
    odd = [*talks[:3], talk("what? " * 500, "a cat"), talk("$x^?", "\x01 日本"), None]
    data = write_data(tmp_path / "data", train=talks, test=odd)
    options = f"--data jsonl:{data} --max-steps 2 --val-samples 2 --lm-max-position-embeddings 256"
    result = train(tmp_path / "run", options)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    outcome = json.loads((tmp_path / "run" / "result.json").read_text())["seeing"]
    assert outcome["questions"] == 4 and len(outcome["skipped"]) == 2
    assert "1 unreadable and 1 too long for the model" in result.stdout
    assert Image.open(tmp_path / "run" / "samples.png").size[0] > 500


def test_weights_and_biases_that_fail_at_the_end_are_named(tmp_path, capsys):
    class Broken:
        summary: ClassVar[dict[str, float]] = {}

        def finish(self):
            raise ConnectionError("no route to host")

    journal = Journal(tmp_path, VLMConfig(), TrainConfig(), RunState(), World())
    journal.wandb = Broken()
    journal.close({"sees": 0.5})
    said = "warning: no more is logged to Weights & Biases: no route to host"
    assert said in capsys.readouterr().out and Broken.summary == {"sees": 0.5}
