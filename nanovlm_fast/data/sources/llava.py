"""LLaVA's conversation format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovlm_fast.data.images import printable
from nanovlm_fast.data.same import Pictures, of_files
from nanovlm_fast.data.sources.example import Example


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


# a picture, or what else cannot be shown, under another name: img, Image, main_image, image_path1
KINDS = "image|img|picture|pic|photo|screenshot|frame|video|audio"
ENDS = "path|file|filename|file_name|name|url|list|data|bytes|base64|b64"
SHOWN = re.compile(rf"(.*[\W_])?({KINDS})s?[\W_]?({ENDS})?s?[\W_]?\d*")
FILE = re.compile(r".*\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|jp2|avif|mp4)", re.IGNORECASE)


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
        if seems_shown(key, value):
            found = f"no 'image', but {key!r}"
            raise ValueError(f"{found}: pictures are named under 'image' or 'images'")
    return []


def seems_shown(key: str, value: Any) -> bool:
    """Whether an entry is a picture by its name, or by a file's name in it; what a turn says is not."""
    if not value or not isinstance(value, (str, list, dict)) or key in ("value", "content", "text"):
        return False
    if SHOWN.fullmatch(key.lower()) or (isinstance(value, str) and FILE.fullmatch(value.strip())):
        return True
    entries = value.items() if isinstance(value, dict) else ((key, part) for part in value)
    return not isinstance(value, str) and any(seems_shown(*entry) for entry in entries)


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
            outside = [
                path
                for path in dict.fromkeys(images)
                if not path.resolve().is_relative_to(self.folder)
            ]
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            RuntimeError,
        ) as error:
            reason = printable(repr(error))  # the last two: nested too deep, and a link to itself
            raise ValueError(
                f"{where}: not a record in LLaVA's conversation format ({reason})"
            ) from error
        if outside:
            raise ValueError(
                f"{where}: image {printable(str(outside[0]))} lies outside {self.folder}"
            )
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
        roles = [self.ASKS, self.ANSWERS] * (len(turns) // 2)
        if (
            not turns
            or len(turns) % 2
            or any(who not in role for (who, _), role in zip(turns, roles, strict=True))
        ):
            found = printable(", ".join(str(who) for who, _ in turns))
            raise ValueError(
                f"{where}: conversations must alternate human and gpt, found: {found or 'nothing'}"
            )
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
