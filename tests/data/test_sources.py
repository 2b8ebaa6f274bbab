"""The table of data sets: what `--data` selects, and what a new data set needs."""

from __future__ import annotations

import pytest

from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.example import Example, Scoring, Source
from nanovlm_fast.data.sources.registry import SOURCES, is_local, load_source, texts
from nanovlm_fast.data.split import split_off
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.presets import preset

NO_FORMS = ["easy-vqa", "easy_vqa:", "easy_vqa:red", "jsonl", "jsonl:", "prepared", "prepared:", ""]


@pytest.mark.parametrize("name", NO_FORMS)
def test_unknown_data_sets_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"unknown data set .*; there are: easy_vqa, synthetic, "):
        load_source(name, "train")
    with pytest.raises(ValueError, match="synthetic:IMAGE_SIZE must be"):
        load_source("synthetic:big", "train")


class OneExample(Source):
    """What a new data set needs: this class, and a line in the table."""

    FORMS = ("one:NAME",)
    scoring = Scoring(prompt="{question}", reply_tokens=1)

    def __init__(self, name: str):
        self.name = name

    @classmethod
    def open(cls, split: str, argument: str) -> OneExample:
        return cls(f"{argument}/{split}")

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        return Example(self.name, [], [("who?", "me")])


def test_a_data_set_is_a_class_and_a_line_in_the_table(monkeypatch):
    monkeypatch.setitem(SOURCES, "one", OneExample)
    source = load_source("one:me", "test")
    assert (source[0].name, source.scoring.reply_tokens) == ("me/test", 1)
    assert (source.fingerprint, source.pictures(), source.file) == (None, None, None)
    with pytest.raises(ValueError, match="unknown data set 'one'"):
        load_source("one", "test")
    model, train = preset("tiny")
    tokenizer = Tokenizer.train(texts(source, source.scoring.prompt), 300)
    text = TextProcessor(tokenizer, model.prompt, model.image_tokens)
    (document,) = SampleLoader(source, model, train, text)(0).documents
    assert document.question == "who?"
    # What is held out of training data is asked as the model is trained
    assert split_off(source, 0, seed=0)[1].scoring is None


def test_a_name_of_the_table_goes_with_and_without_its_argument():
    assert len(load_source("synthetic", "test")) == len(load_source("synthetic:", "test")) == 64
    assert load_source("synthetic:32", "test")[0].images[0].size == (32, 32)
    assert not is_local("mmstar") and is_local("mmstar:FOLDER") and is_local("jsonl:FOLDER")
    assert is_local("easy_vqa") and not is_local("OWNER/NAME:CONFIG")
