"""Data sets behind one small interface: `len(source)`, and `source[i]` -> `Example` with images and turns.

A new source is one class and one line in `load_source`.
"""

from __future__ import annotations

import contextlib
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
from nanovlm_fast.data.same import Pictures, of_files
from nanovlm_fast.data.text import Tokenizer, Turn
from nanovlm_fast.packing import Document
from nanovlm_fast.ranges import Range


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
    """A data set.

    One with its own way of being scored has `prompt`, `right(reply, answer)` and `reply_tokens` too.
    It may have `fingerprint`, which changes with its content, so that no run goes on with other
    data; and `pictures()`, without which each example is taken to have pictures of its own.
    """

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
        self.fingerprint = hashlib.sha256(repr(sorted(self.turns.items())).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        image, path = self.paths[index]
        return Example(f"easy_vqa/{self.split}/{image}", [path], self.turns[image])

    def pictures(self) -> Pictures:
        return of_files([Path(path)] for _, path in self.paths)


SYNTHETIC = Range(int, least=8, most=2**12)  # sides of an image; a square's is an eighth or more
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


class Synthetic:
    """Coloured squares made on the fly: no files, no packages; for tests and benches."""

    def __init__(self, split: str, size: int = 64):
        self.split, self.size, self.count = split, size, {"train": 256, "test": 64}[split]
        self.fingerprint = f"synthetic/{split}/{size}"

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


def content_of(content: Any) -> str:
    """What an OpenAI-style message says: text, or parts, where {"type": "image"} is an <image>."""
    if not isinstance(content, list):
        return text_of(content)
    said = []
    for part in content:
        if part["type"] == "text":
            said.append(text_of(part["text"]))
        elif part["type"] == "image" and not (part.keys() & {"image", "url", "path", "base64"}):
            said.append("<image>")
        else:
            raise ValueError(f"a part of type {part['type']!r}: name pictures under 'image'")
    return "\n".join(said)


# a picture, or what else cannot be shown, under another name: img, Image, image_path, image1, video
KINDS = "image|img|picture|pic|photo|video|audio"
SHOWN = re.compile(rf"({KINDS})s?(path|file|filename|name|url)?s?\d*")


def images_of(record: dict[str, Any]) -> list[str]:
    """The names under 'image' or 'images'.

    Raises ValueError where the record seems to have them elsewhere: it would train blind.
    """
    given = [record[key] for key in ("image", "images") if record.get(key)]
    if len(given) > 1:
        raise ValueError("pictures under 'image' and under 'images': which?")
    if given:
        return [given[0]] if isinstance(given[0], str) else [*given[0]]
    for key, value in record.items():
        if value and SHOWN.fullmatch(re.sub(r"[\W_]", "", key.lower())):
            found = f"no 'image', but {key!r}"
            raise ValueError(f"{found}: pictures are named under 'image' or 'images'")
    return []


def turns_of(record: dict[str, Any]) -> list[tuple[Any, str]]:
    """(role, text) of each turn: 'conversations' as LLaVA has them, or 'messages' as OpenAI has."""
    if record.get("conversations") and record.get("messages"):
        raise ValueError("both 'conversations' and 'messages': which?")
    if record.get("messages"):
        return [(turn["role"], content_of(turn["content"])) for turn in record["messages"]]
    return [(turn["from"], text_of(turn["value"])) for turn in record["conversations"]]


def elements_of(text: str) -> list[str]:
    """The elements of a JSON array, as text.

    Raises ValueError if it is none, and RecursionError if it is nested too deep.
    """
    decoder, spaces = json.JSONDecoder(), re.compile(r"\s*")
    elements, place = [], spaces.match(text, text.index("[") + 1).end()
    while text[place : place + 1] != "]":
        # an element at a time: as objects, all would fill the memory
        end = decoder.raw_decode(text, place)[1]
        elements.append(text[place:end])
        place = spaces.match(text, end).end()
        if text[place : place + 1] == ",":
            place = spaces.match(text, place + 1).end()
        elif text[place : place + 1] != "]":
            raise ValueError(f"neither a comma nor an end after element {len(elements)}")
    if text[place + 1 :].strip():
        raise ValueError("something follows its end")
    return elements


def records_of(file: Path, content: bytes) -> list[tuple[str, bytes]]:
    """(place, text) of each record of a file: an element of its JSON array, or a line.

    Not read yet: what is bad in a record, bytes that are no UTF-8 too, is its own. Raises
    ValueError, with the file's name, for a .json whose array is damaged, and for UTF-16.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} is UTF-16: save it as UTF-8")
    if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        try:
            elements = elements_of(content.decode("utf-8", "surrogateescape"))
            texts = [element.encode("utf-8", "surrogateescape") for element in elements]
            return [(f": record {n}", text) for n, text in enumerate(texts, 1)]
        except (ValueError, RecursionError) as error:
            if file.suffix == ".json":
                raise ValueError(f"{file} is damaged: {printable(str(error))}") from error
    lines = [(f":{n}", line) for n, line in enumerate(content.split(b"\n"), 1)]
    return [(place, line) for place, line in lines if line.removeprefix(b"\xef\xbb\xbf").strip()]


class JsonLines:
    """A folder with `train.jsonl`, optionally `test.jsonl`, and images, in LLaVA's conversation format.

    One object a line, or a JSON array of them, in `train.jsonl` or else `train.json`:
    {"image": "a.png" or ["a.png", "b.png"] or absent, "conversations": [{"from": "human", "value":
    "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}, ...]}. `images` is as good as
    `image`, and `messages` with `role` and `content` as good as `conversations`. Images come first
    in a document, wherever `<image>` stands in a question; in an answer it is text. A system turn
    at the start is put before every question. Image names are relative to the folder and may not
    leave it. A malformed record raises ValueError with its line or number when it is read.
    """

    ASKS, ANSWERS = ("human", "user"), ("gpt", "assistant")

    def __init__(self, split: str, folder: Path):
        files = [folder / f"{split}.jsonl", folder / f"{split}.json"]
        found = [file for file in files if file.exists()]
        if not found:
            there = f"there is no {files[0]} (nor {files[1].name})"
            raise FileNotFoundError(f"--data jsonl:{folder}: {there}")
        self.folder, self.file = folder.resolve(), found[0]
        content = self.file.read_bytes()
        # pictures that change under their names are not seen: they would have to be read
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.records = records_of(self.file, content)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        place, line = self.records[index]
        where = f"{self.file}{place}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
            images = [self.folder / name for name in images_of(record)]
            turns = turns_of(record)
            outside = [path for path in dict.fromkeys(images) if not path.resolve().is_relative_to(self.folder)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
            reason = printable(repr(error))  # the last two: nested too deep, and a link to itself
            raise ValueError(f"{where}: not a record in LLaVA's conversation format ({reason})") from error
        if outside:
            raise ValueError(f"{where}: image {printable(str(outside[0]))} lies outside {self.folder}")
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
        roles = [self.ASKS, self.ANSWERS] * (len(turns) // 2)
        if not turns or len(turns) % 2 or any(who not in role for (who, _), role in zip(turns, roles, strict=True)):
            found = printable(", ".join(str(who) for who, _ in turns))
            raise ValueError(f"{where}: conversations must alternate human and gpt, found: {found or 'nothing'}")
        asked, answers = [text for _, text in turns[::2]], [text.strip() for _, text in turns[1::2]]
        marks = "".join([system, *asked]).count("<image>")
        if marks not in (0, len(images)):
            raise ValueError(f"{where}: {marks} times <image> for {len(images)} images")
        if marks != len(images) and any("<image>" in answer for answer in answers):
            why = "a model here sees pictures and makes none"
            raise ValueError(f"{where}: <image> in an answer: {why}")
        before = [system.replace("<image>", "").strip()]
        plain = [question.replace("<image>", "").strip() for question in asked]
        questions = ["\n".join(filter(None, [*before, question])) for question in plain]
        return Example(where, images, list(zip(questions, answers, strict=True)))

    def pictures(self) -> Pictures:
        return of_files(self._images(index) for index in range(len(self)))

    def _images(self, index: int) -> Sequence[Path]:
        try:
            return self[index].images
        except ValueError:  # named when it is met
            return ()


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
    if kind == "synthetic":
        return Synthetic(split, SYNTHETIC.read("--data synthetic:IMAGE_SIZE", rest or 64))
    if kind == "jsonl" and rest:
        return JsonLines(split, at_home(rest))
    if (prepared := prepared_folder(data)) is not None:
        return shards.Prepared(prepared if split == "train" else prepared / split)
    if kind == "mmstar":
        return hub.MMStar(rest or hub.MMSTAR)
    if (kind and at_home(kind).is_dir()) or HUB_NAME.fullmatch(kind):
        return hub.Cauldron(data, split)
    raise ValueError(f"unknown data set {data!r}; there are: {KNOWN}")


def prepared_folder(data: str) -> Path | None:
    """The folder of prepared shards that `data` names: prepared:FOLDER, or a FOLDER that holds a manifest."""
    kind, _, rest = data.partition(":")
    if kind == "prepared" and rest:
        return at_home(rest)
    return at_home(data) if data and (at_home(data) / "manifest.json").exists() else None


def at_home(name: str) -> Path:
    """The path with the home folder for `~`: a shell leaves that alone in --data jsonl:~/FOLDER."""
    with contextlib.suppress(RuntimeError):  # ~NOBODY
        return Path(name).expanduser()
    return Path(name)


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
