"""The data set that `--data` names, and the tokenizer that goes with it.

A new data set is one file in this folder, with a class derived from `Source`, and one line in
`SOURCES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.chat import END, START
from nanovlm_fast.data.sources.canvas import EasyVQACanvas
from nanovlm_fast.data.sources.cauldron import Cauldron
from nanovlm_fast.data.sources.easy_vqa import EasyVQA
from nanovlm_fast.data.sources.emoji import EmojiPictures
from nanovlm_fast.data.sources.example import Source
from nanovlm_fast.data.sources.finevision import FINEVISION, FineVision
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.mmstar import MMStar
from nanovlm_fast.data.sources.shards import Prepared
from nanovlm_fast.data.sources.streamed import StreamedRows
from nanovlm_fast.data.sources.synthetic import Synthetic
from nanovlm_fast.data.text import EOS, Tokenizer
from nanovlm_fast.paths import at_home

# NAME of --data NAME or NAME:ARGUMENT. Hub names and folders are not in the table; they are read as
# the Cauldron's schema, or as prepared shards where a folder holds their manifest
SOURCES: dict[str, type[Source]] = {
    "easy_vqa": EasyVQA,
    "synthetic": Synthetic,
    "jsonl": JsonLines,
    "prepared": Prepared,
    "mmstar": MMStar,
    "finevision": FineVision,
    "easy_vqa_canvas": EasyVQACanvas,
    "emoji": EmojiPictures,
}

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
KNOWN = (
    ", ".join(form for kind in SOURCES.values() for form in kind.FORMS)
    + ", and of the Cauldron's schema OWNER/NAME on the Hugging Face hub or a FOLDER that exists, "
    "both also with :CONFIG,CONFIG"
)


def load_source(data: str, split: str) -> Source:
    """The `split` ('train' or 'test') of a data set named as in --data.

    Raises ValueError for an unknown name, FileNotFoundError where there is no such split, OSError
    if the hub cannot be reached.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; there are: train, test")
    name, colon, argument = data.partition(":")
    kind = SOURCES.get(name)
    # The table goes before folders of the same name: easy_vqa means the package everywhere
    if kind is not None and takes(kind, bool(colon), argument):
        return kind.open(split, argument)
    # A manifest goes before the Cauldron's schema: shards are Arrow files, which it would read too
    if (prepared := prepared_folder(data)) is not None:
        return Prepared.open(split, str(prepared))
    if (name and at_home(name).is_dir()) or HUB_NAME.fullmatch(name):
        return Cauldron(data, split)
    raise ValueError(f"unknown data set {data!r}; there are: {KNOWN}")


def open_stream(data: str, split: str) -> StreamedRows:
    """The same data set as a stream.

    Raises ValueError for one that cannot be streamed, and what `StreamedRows` raises.
    """
    kind, place = streamable(data)
    return StreamedRows(kind, place, split)


def streamable(data: str) -> tuple[type[Cauldron], str]:
    """(what reads the rows, where they are) of a data set. Raises ValueError for another kind."""
    name, _, argument = data.partition(":")
    if name == "finevision":
        return FineVision, argument or FINEVISION
    if name in SOURCES or prepared_folder(data) is not None:
        known = "a hub name or a folder of The Cauldron's schema, or finevision:"
        raise ValueError(f"--streaming reads {known}, and not --data {data} (--no-streaming does)")
    return Cauldron, data


def takes(kind: type[Source], colon: bool, argument: str) -> bool:
    """Whether one of the source's forms is NAME, or NAME:ARGUMENT with `colon`."""
    bare = any(":" not in form for form in kind.FORMS)
    with_argument = any(":" in form for form in kind.FORMS)
    if not colon:
        return bare
    # "synthetic:" is "synthetic", but "jsonl:" lacks its folder
    return with_argument and bool(argument or bare)


def prepared_folder(data: str) -> Path | None:
    """The folder if `data` is a FOLDER that holds the manifest of prepared shards."""
    return at_home(data) if data and (at_home(data) / "manifest.json").exists() else None


def is_local(data: str) -> bool:
    """Whether `data`, named as in --data, is on this machine.

    A hub's data set is not, even if a cache holds a copy: whether the copy is complete is known
    only when it is read.
    """
    name, _, argument = data.partition(":")
    kind = SOURCES.get(name)
    if kind is not None and kind.ON_HUB:
        place = argument.partition(":")[0]
        return bool(place) and (at_home(place).is_dir() or not HUB_NAME.fullmatch(place))
    return at_home(name).is_dir() or not HUB_NAME.fullmatch(name)


def make_tokenizer(model: VLMConfig, source: Source | None, local: bool = False) -> Tokenizer:
    """The tokenizer of prepared data, or else what --lm-tokenizer says.

    That is one made from the text of `source` ('train'), or one by hub name or folder. `source` may
    be None if none is to be made. Raises ValueError if it has more entries than the model, and
    FileNotFoundError for a hub name with `local`, which forbids network access.
    """
    stored = None if source is None else source.stored_tokenizer(model.lm_tokenizer)
    if stored is not None:
        # Not made anew from the same text: the token ids in the shards are those of this one
        tokenizer = stored
    elif model.lm_tokenizer == "train":
        if source is None:
            raise ValueError("a tokenizer is made from data, and there is none")
        # Those of tiles get the last rows, as in nanoVLM's models
        size = model.lm_vocab_size - len(model.vlm_extra_tokens)
        if model.lm_chat_template:  # as `ChatProcessor.document` encodes texts
            said = texts(source, "user\n{question}", "assistant\n{answer}")
            tokenizer = Tokenizer.train(said, size, (EOS, START, END))
        else:
            tokenizer = Tokenizer.train(texts(source, model.prompt), size)
    elif local and not Path(model.lm_tokenizer).is_dir():
        raise FileNotFoundError(
            f"tokenizer {model.lm_tokenizer} is on the hub, and this reads nothing from there"
        )
    else:
        tokenizer = Tokenizer.from_hub(model.lm_tokenizer)
    tokenizer.reserve(list(model.vlm_extra_tokens.values()))
    if len(tokenizer) > model.lm_vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, --lm-vocab-size is {model.lm_vocab_size}"
        )
    return tokenizer


def texts(
    source: Source, prompt: str, reply: str = " {answer}", limit: int = 50_000
) -> Iterator[str]:
    """Prompts and answers of the first `limit` examples, to train a tokenizer on.

    Answers have a blank before them, as `TextProcessor.document` encodes them.

    Unreadable examples are left out here and reported when the stream meets them.
    """
    for index in range(min(len(source), limit)):
        try:
            turns = source.turns_of(index)
        except ValueError:
            continue
        for question, answer in turns:
            yield prompt.format(question=question)
            yield reply.format(answer=answer)
