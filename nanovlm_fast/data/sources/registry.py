"""Data sets behind one small interface: `len(source)`, and `source[i]` -> `Example` with images and turns.

A new source is one class and one line in `load_source`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.sources import mmstar as mmstar_module
from nanovlm_fast.data.sources.easy_vqa import EasyVQA
from nanovlm_fast.data.sources.example import Source, whole
from nanovlm_fast.data.sources.llava import (
    JsonLines,
)
from nanovlm_fast.data.sources.synthetic import SYNTHETIC, Synthetic
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.paths import at_home

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
KNOWN = (
    "easy_vqa, synthetic, synthetic:IMAGE_SIZE, jsonl:FOLDER, prepared:FOLDER, mmstar, mmstar:FOLDER, and of the "
    "Cauldron's schema OWNER/NAME on the Hugging Face hub or a FOLDER that exists, both also with :CONFIG,CONFIG"
)


def load_source(data: str, split: str) -> Source:
    """The `split` ('train' or 'test') of a data set named as in --data.

    Raises ValueError for an unknown name, FileNotFoundError where there is no such split, OSError if the hub cannot be
    reached.
    """
    from nanovlm_fast.data.sources import cauldron as hub  # they import Example from here
    from nanovlm_fast.data.sources import shards  # they import Example from here

    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; there are: train, test")
    kind, _, rest = data.partition(":")
    if data == "easy_vqa":
        return EasyVQA(split)
    if kind == "synthetic":
        return Synthetic(split, SYNTHETIC.read("--data synthetic:IMAGE_SIZE", rest or 64))
    if kind == "jsonl" and rest:
        return JsonLines(split, at_home(rest))
    if (prepared := prepared_folder(data)) is not None:
        return shards.Prepared(prepared if split == "train" else prepared / split)
    if kind == "mmstar":
        return mmstar_module.MMStar(rest or mmstar_module.MMSTAR)
    if (kind and at_home(kind).is_dir()) or HUB_NAME.fullmatch(kind):
        return hub.Cauldron(data, split)
    raise ValueError(f"unknown data set {data!r}; there are: {KNOWN}")


def prepared_folder(data: str) -> Path | None:
    """The folder of prepared shards that `data` names: prepared:FOLDER, or a FOLDER that holds a manifest."""
    kind, _, rest = data.partition(":")
    if kind == "prepared" and rest:
        return at_home(rest)
    return at_home(data) if data and (at_home(data) / "manifest.json").exists() else None


def is_local(data: str) -> bool:
    """Whether a data set named as in --data is on this machine, whatever a hub's cache may hold."""
    kind, _, rest = data.partition(":")
    if kind == "mmstar":
        return bool(rest)
    return at_home(kind).is_dir() or not HUB_NAME.fullmatch(kind)


def make_tokenizer(model: VLMConfig, source: Source, local: bool = False) -> Tokenizer:
    """Prepared data's own; or what --lm-tokenizer says: one made from the source's text, or a Hugging Face one.

    Raises ValueError if it has more entries than the model, and FileNotFoundError if `local` forbids to ask the hub.
    """
    from nanovlm_fast.data.sources.shards import Prepared

    prepared = whole(source)
    if isinstance(prepared, Prepared) and prepared.manifest["lm_tokenizer"] == model.lm_tokenizer:
        tokenizer = Tokenizer.load(prepared.folder)
    elif model.lm_tokenizer == "train":
        tokenizer = Tokenizer.train(texts(source, model.prompt), model.lm_vocab_size)
    elif local and not Path(model.lm_tokenizer).is_dir():
        raise FileNotFoundError(
            f"tokenizer {model.lm_tokenizer} is on the hub, and this reads nothing from there"
        )
    else:
        tokenizer = Tokenizer.from_hub(model.lm_tokenizer)
    if len(tokenizer) > model.lm_vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, --lm-vocab-size is {model.lm_vocab_size}"
        )
    return tokenizer


def texts(source: Source, prompt: str, limit: int = 50_000) -> Iterator[str]:
    """Prompts and answers of the first `limit` examples, to train a tokenizer on. Unreadable examples are left out."""
    for index in range(min(len(source), limit)):
        try:
            turns = source[index].turns
        except ValueError:
            continue
        for question, answer in turns:
            yield prompt.format(question=question)
            yield f" {answer}"
