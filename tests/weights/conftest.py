"""Fixtures of the tests of weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.weights.folder import save_pretrained
from tests.support.backbones import llama, siglip
from tests.support.exports import CONFIGS, random_model


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> Path:
    """A folder with `vision` and `language`. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    siglip(folder / "vision")
    llama(folder / "language")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """281 entries: fewer than some of the models have rows, as many as one has."""
    text = ["Question: what color is the shape? Answer:", " a red circle", " blue"] * 9
    made = Tokenizer.train(text, 281)
    assert len(made) == 281
    return made


@pytest.fixture
def saved_model(tmp_path, tokenizer) -> Path:
    config = dataclasses.replace(
        CONFIGS["untied, normalised, full vocabulary"], lm_vocab_size=290
    )  # room for an entry more
    save_pretrained(tmp_path / "model", random_model(config), tokenizer)
    return tmp_path / "model"
