"""Evaluation: what counts as right, and what is asked in each mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SMALL

from nanovlm_fast import evaluate as module
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.sources import Example
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.evaluate import evaluate
from nanovlm_fast.model import VisionLanguageModel

LONG = "a rather long answer of many words which no short limit on new tokens would let through to its end"


class Talks(list):
    """A source of text-only examples."""


def source(*talks: list[tuple[str, str]]) -> Talks:
    return Talks(Example(f"talk {i}", [], turns) for i, turns in enumerate(talks))


@pytest.fixture
def setup(monkeypatch):
    """A model whose replies are looked up by the last question; `asked` collects the prompts as text."""
    tokenizer = Tokenizer.train(["who? what? where? yes no blue " + LONG], 300)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300, "lm_max_position_embeddings": 256}))
    replies: dict[str, str] = {}
    asked: list[str] = []

    def answer(model, images, prompts, eos_id, max_new_tokens):
        texts = [tokenizer.base.decode(p.input_ids.tolist(), skip_special_tokens=False) for p in prompts]
        asked.extend(texts)
        said = [
            next(reply for question, reply in replies.items() if text.endswith(f"{question} Answer:")) for text in texts
        ]
        return [tokenizer.encode(f" {reply}")[:max_new_tokens] for reply in said]

    monkeypatch.setattr(module, "generate", answer)
    return model, tokenizer, replies, asked


def test_exact_match_by_kind(setup):
    model, tokenizer, replies, _ = setup
    replies |= {"who?": "blue", "what?": "yes", "where?": LONG}
    result = evaluate(model, tokenizer, source([("who?", "blue"), ("what?", "no")], [("where?", LONG)]))
    assert (result.correct, result.total) == (2, 3)
    assert dict(result.by_kind) == {"open": [2, 2], "yes/no": [0, 1]}
    assert result.as_dict()["accuracy"] == pytest.approx(2 / 3)


def test_an_answer_that_only_begins_right_is_wrong(setup):
    model, tokenizer, replies, _ = setup
    replies["who?"] = "blue yes"
    assert evaluate(model, tokenizer, source([("who?", "blue")])).correct == 0


@pytest.mark.parametrize(("mode", "questions"), [("independent", 3), ("chat", 3), ("first", 1)])
def test_modes_ask_as_they_were_trained(setup, mode, questions):
    model, tokenizer, replies, asked = setup
    replies |= {"who?": "no", "what?": "no", "where?": "no"}
    turns = [("who?", "yes"), ("what?", "blue"), ("where?", "no")]
    assert evaluate(model, tokenizer, source(turns), mode).total == questions == len(asked)
    history = [text.count("Question:") for text in asked]
    assert history == {"independent": [1, 1, 1], "chat": [1, 2, 3], "first": [1]}[mode]
    if mode == "chat":
        assert "yes" in asked[1] and "blue" in asked[2]


def test_too_long_a_prompt_is_left_out_and_named(setup):
    model, tokenizer, replies, _ = setup
    replies["who?"] = "yes"
    result = evaluate(model, tokenizer, source([(LONG * 20, "no")], [("who?", "yes")]))
    assert (result.correct, result.total) == (1, 1) and "talk 0" in result.skipped[0]


def test_blank_images_are_blank_and_unreadable_ones_named(monkeypatch):
    torch.manual_seed(0)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, "lm_vocab_size": 300}))
    tokenizer = Tokenizer.train(["what? yes"], 300)
    seen = []

    def answer(model, images, prompts, eos_id, max_new_tokens):
        seen.append(images)
        return [[] for _ in prompts]

    monkeypatch.setattr(module, "generate", answer)
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    examples = Talks(
        [Example("good", [noise], [("what?", "yes")]), Example("bad", ["/nowhere.png"], [("what?", "yes")])]
    )
    for blank in (False, True):
        result = evaluate(model, tokenizer, examples, blank_images=blank)
        assert result.total == 1 and "nowhere.png" in result.skipped[0]
    assert len(seen[0].unique()) > 100 and seen[1].unique().tolist() == [module.BLANK]
