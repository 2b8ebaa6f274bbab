"""Data sets behind one small interface: `len(source)`, and `source[i]` -> `Example` with images and turns.

A new source is one class and one line in `load_source`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.text import Tokenizer, Turn
from nanovlm_fast.packing import Document


@dataclass
class Example:
    """Images as paths, bytes, arrays or PIL images, decoded later in a worker; turns are (question, answer)."""

    name: str
    images: Sequence[Any]
    turns: list[Turn]
    kind: str = ""  # what its answers are counted under in an evaluation
    documents: list[Document] | None = None  # of prepared data (shards.py), whose images are (n, 3, H, W) uint8

    def first(self) -> Example:
        """First image, first turn: what nanoVLM v0.1 takes of an example (--turns first)."""
        return replace(self, images=self.images[:1], turns=self.turns[:1])


class Source(Protocol):
    """A data set. One with its own way of being scored has `prompt`, `right(reply, answer)` and `reply_tokens` too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Subset:
    """The examples of `source` at `indices`, in that order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


def whole(source: Source) -> Source:
    """The data set that a subset is of."""
    return source.source if isinstance(source, Subset) else source


class EasyVQA:
    """easy-VQA (package `easy-vqa`, Victor Zhou): coloured shapes, about ten questions an image."""

    def __init__(self, split: str):
        import easy_vqa

        paths, questions = {
            "train": (easy_vqa.get_train_image_paths, easy_vqa.get_train_questions),
            "test": (easy_vqa.get_test_image_paths, easy_vqa.get_test_questions),
        }[split]
        self.split = split
        self.paths = sorted(paths().items())
        self.turns: dict[int, list[Turn]] = {image: [] for image, _ in self.paths}
        for question, answer, image in zip(*questions(), strict=True):
            self.turns[image].append((question, answer))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        image, path = self.paths[index]
        return Example(f"easy_vqa/{self.split}/{image}", [path], self.turns[image])


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


class Synthetic:
    """Coloured squares made on the fly: no files, no packages; for tests and benches."""

    def __init__(self, split: str, size: int = 64):
        self.split, self.size, self.count = split, size, {"train": 256, "test": 64}[split]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.split == "test", index])
        colour = str(rng.choice(list(COLOURS)))
        pixels = np.full((self.size, self.size, 3), rng.integers(90, 160), np.uint8)
        x, y = rng.integers(0, self.size // 2, 2)
        side = rng.integers(self.size // 8, self.size // 2)
        pixels[y : y + side, x : x + side] = COLOURS[colour]
        other = str(rng.choice(list(COLOURS)))
        turns = [
            ("what color is the square?", colour),
            (f"is the square {other}?", "yes" if other == colour else "no"),
            ("is the square in the upper half of the picture?", "yes" if y + side // 2 < self.size // 2 else "no"),
        ]
        return Example(f"synthetic/{self.split}/{index}", [Image.fromarray(pixels)], turns[: int(rng.integers(1, 4))])


def text_of(value: Any) -> str:
    """What a turn says, which may be a number. Raises ValueError for what no tokenizer takes: half a surrogate pair."""
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"value must be text, not {type(value).__name__}")
    return str(value).encode().decode()


class JsonLines:
    """A folder with `train.jsonl`, optionally `test.jsonl`, and images, in LLaVA's conversation format.

    One object a line: {"image": "a.png" or ["a.png", "b.png"] or absent, "conversations": [{"from": "human", "value":
    "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}, ...]}. Images come first in a document, wherever
    `<image>` stands. Image names are relative to the folder and may not leave it. A malformed line raises ValueError
    with its number when it is read.
    """

    ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")

    def __init__(self, split: str, folder: Path):
        self.folder, self.file = folder.resolve(), folder / f"{split}.jsonl"
        if not self.file.exists():
            raise FileNotFoundError(f"--data jsonl:{folder}: there is no {self.file}")
        content = self.file.read_bytes()  # decoded line by line: one that is no UTF-8 is a bad record, not the end
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Example:
        number, line = self.lines[index]
        where = f"{self.file}:{number}"
        try:
            record = json.loads(line.decode())
            names = record.get("image") or []
            images = [self.folder / name for name in ([names] if isinstance(names, str) else [*names])]
            turns = [(turn["from"], text_of(turn["value"])) for turn in record["conversations"]]
            outside = [path for path in dict.fromkeys(images) if not path.resolve().is_relative_to(self.folder)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
            reason = printable(repr(error))  # the last two: nested too deep, and a link to itself
            raise ValueError(f"{where}: not a record in LLaVA's conversation format ({reason})") from error
        if outside:
            raise ValueError(f"{where}: image {printable(str(outside[0]))} lies outside {self.folder}")
        marks = sum(value.count("<image>") for _, value in turns)
        if marks not in (0, len(images)):
            raise ValueError(f"{where}: {marks} times <image> for {len(images)} images")
        if turns and turns[0][0] == "system":
            turns = turns[1:]
        roles = [self.ASKS, self.ANSWERS] * (len(turns) // 2)
        if not turns or len(turns) % 2 or any(who not in role for (who, _), role in zip(turns, roles, strict=True)):
            found = printable(", ".join(str(who) for who, _ in turns))
            raise ValueError(f"{where}: conversations must alternate human and gpt, found: {found or 'nothing'}")
        values = [value.replace("<image>", "").strip() for _, value in turns]
        return Example(where, images, list(zip(values[::2], values[1::2], strict=True)))


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
    from nanovlm_fast.data import hub, shards  # they import Example from here

    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; there are: train, test")
    kind, _, rest = data.partition(":")
    if data == "easy_vqa":
        return EasyVQA(split)
    if kind == "synthetic" and (not rest or rest.isdigit()):
        return Synthetic(split, int(rest or 64))
    if kind == "jsonl" and rest:
        return JsonLines(split, Path(rest))
    if (prepared := prepared_folder(data)) is not None:
        return shards.Prepared(prepared if split == "train" else prepared / split)
    if kind == "mmstar":
        return hub.MMStar(rest or hub.MMSTAR)
    if (kind and Path(kind).expanduser().is_dir()) or HUB_NAME.fullmatch(kind):
        return hub.Cauldron(data, split)
    raise ValueError(f"unknown data set {data!r}; there are: {KNOWN}")


def prepared_folder(data: str) -> Path | None:
    """The folder of prepared shards that `data` names: prepared:FOLDER, or a FOLDER that holds a manifest."""
    kind, _, rest = data.partition(":")
    if kind == "prepared" and rest:
        return Path(rest)
    return Path(data) if data and (Path(data) / "manifest.json").exists() else None


def is_local(data: str) -> bool:
    """Whether a data set named as in --data is on this machine, whatever a hub's cache may hold."""
    kind, _, rest = data.partition(":")
    if kind == "mmstar":
        return bool(rest)
    return Path(kind).expanduser().is_dir() or not HUB_NAME.fullmatch(kind)


def make_tokenizer(model: VLMConfig, source: Source, local: bool = False) -> Tokenizer:
    """Prepared data's own; or what --lm-tokenizer says: one made from the source's text, or a Hugging Face one.

    Raises ValueError if it has more entries than the model, and FileNotFoundError if `local` forbids to ask the hub.
    """
    from nanovlm_fast.data.shards import Prepared

    prepared = whole(source)
    if isinstance(prepared, Prepared) and prepared.manifest["lm_tokenizer"] == model.lm_tokenizer:
        tokenizer = Tokenizer.load(prepared.folder)
    elif model.lm_tokenizer == "train":
        tokenizer = Tokenizer.train(texts(source, model.prompt), model.lm_vocab_size)
    elif local and not Path(model.lm_tokenizer).is_dir():
        raise FileNotFoundError(f"tokenizer {model.lm_tokenizer} is on the hub, and this reads nothing from there")
    else:
        tokenizer = Tokenizer.from_hub(model.lm_tokenizer)
    if len(tokenizer) > model.lm_vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, --lm-vocab-size is {model.lm_vocab_size}")
    return tokenizer


def split_off(source: Source, held_out: int, seed: int) -> tuple[Source, Source]:
    """(the rest, `held_out` random examples but at most half). Raises ValueError if the source is empty."""
    if len(source) == 0:
        raise ValueError("the data set is empty")
    order = np.random.default_rng(seed).permutation(len(source))
    held_out = min(held_out, len(source) // 2)
    return Subset(source, np.sort(order[held_out:])), Subset(source, np.sort(order[:held_out]))


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
