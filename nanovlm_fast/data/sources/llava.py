"""A folder of records in LLaVA's conversation format, or with OpenAI-style messages.

What is read in another form than LLaVA's, and what is refused, follows one rule: a record is used
as it was meant, or refused by name. A picture that is not found would train the model blind, and a
turn that is dropped would train it on half a conversation, both without a sign in the loss.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovlm_fast.data.images import printable
from nanovlm_fast.data.same import Pictures, of_files
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.paths import at_home


def text_of(value: Any) -> str:
    """The text of a turn, which may be a number.

    Raises TypeError for anything else, and ValueError for half a surrogate pair, which JSON can
    spell and no tokenizer takes.
    """
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"value must be text, not {type(value).__name__}")
    text = str(value)
    text.encode()  # raises for half a surrogate pair
    return text


def content_of(content: Any) -> str:
    """The text of an OpenAI-style message: a string, or parts, where {"type": "image"} is <image>.

    Raises ValueError for a part that names its picture itself: pictures come from the record, and
    this one would be lost.
    """
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


# Keys that seem to name a picture, or a medium that a model here cannot take: img, Image,
# main_image, image_path1, video
KINDS = "image|img|picture|pic|photo|screenshot|frame|video|audio"
ENDS = "path|file|filename|file_name|name|url|list|data|bytes|base64|b64"
SHOWN = re.compile(rf"(.*[\W_])?({KINDS})s?[\W_]?({ENDS})?s?[\W_]?\d*")
FILE = re.compile(r".*\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|jp2|avif|mp4)", re.IGNORECASE)


def images_of(record: dict[str, Any]) -> list[str]:
    """The names under 'image' or 'images'.

    Raises ValueError if both are given, or if neither is and another key seems to name a picture.
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
    """Whether an entry seems to be a picture: by its key, or because it holds the name of a file.

    The text of a turn may name a file without showing it, so it is not looked at.
    """
    if not value or not isinstance(value, (str, list, dict)) or key in ("value", "content", "text"):
        return False
    if SHOWN.fullmatch(key.lower()) or (isinstance(value, str) and FILE.fullmatch(value.strip())):
        return True
    entries = value.items() if isinstance(value, dict) else ((key, part) for part in value)
    return not isinstance(value, str) and any(seems_shown(*entry) for entry in entries)


def turns_of(record: dict[str, Any]) -> list[tuple[Any, str]]:
    """(role, text) of each turn, from LLaVA's 'conversations' or OpenAI's 'messages'.

    Raises ValueError if the record has both, KeyError if it has neither.
    """
    if record.get("conversations") and record.get("messages"):
        raise ValueError("both 'conversations' and 'messages': which?")
    if record.get("messages"):
        return [(turn["role"], content_of(turn["content"])) for turn in record["messages"]]
    return [(turn["from"], text_of(turn["value"])) for turn in record["conversations"]]


def elements_of(text: str) -> list[str]:
    """The elements of a JSON array, each as text.

    Raises ValueError if `text` is not a JSON array, and RecursionError if it is nested too deeply.
    """
    decoder = json.JSONDecoder()
    spaces = re.compile(r"\s*")

    def after_spaces(place: int) -> int:
        found = spaces.match(text, place)
        return found.end() if found else place

    elements = []
    place = after_spaces(text.index("[") + 1)
    while text[place : place + 1] != "]":
        # Decoded one at a time and kept as text: as Python objects, those of a large file would
        # take several times its size in memory
        end = decoder.raw_decode(text, place)[1]
        elements.append(text[place:end])
        place = after_spaces(end)
        if text[place : place + 1] == ",":
            place = after_spaces(place + 1)
        elif text[place : place + 1] != "]":
            raise ValueError(f"neither a comma nor an end after element {len(elements)}")
    if text[place + 1 :].strip():
        raise ValueError("something follows its end")
    return elements


def _json_of(text: bytes) -> Any:
    """What the JSON in `text` says; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def key_of_records(content: bytes) -> str | None:
    """The key of the list in a file that is one object, as in {"data": [...]}; else None."""
    content = content.strip()
    first, _, others = content.partition(b"\n")
    if not first.startswith(b"{"):
        return None
    # JSON lines may be gigabytes: their first line is an object by itself, and no more is read
    whole = _json_of(first)
    if whole is not None and others:
        return None
    whole = _json_of(content) if whole is None else whole
    if not isinstance(whole, dict) or {"conversations", "messages"} & whole.keys():
        return None
    lists = (name for name, value in whole.items() if isinstance(value, list) and value)
    return next((name for name in lists if isinstance(whole[name][0], dict)), None)


def records_of(file: Path, content: bytes) -> list[tuple[str, bytes]]:
    """(place, text) of each record of a file: a line, or an element of its JSON array.

    The records are not parsed: one that is bad, or not UTF-8, is refused by name when it is read,
    and costs no other record. Raises ValueError, with the name of the file, for a .json file whose
    array is damaged, for an array inside an object, and for UTF-16.
    """
    # Every second byte of UTF-16 is 0, so all of its lines would be refused, one by one
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} is UTF-16: save it as UTF-8")
    # Its lines would be refused one by one, and the run would stop at --max-bad-samples
    if key := key_of_records(content.removeprefix(b"\xef\xbb\xbf")):
        where = f"{file} is one object, with a list under {printable(key)!r}"
        raise ValueError(f"{where}: save that list alone, as [...], or one record per line")
    if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        try:
            # surrogateescape keeps bytes that are not UTF-8, for the record that has them to fail
            elements = elements_of(content.decode("utf-8", "surrogateescape"))
            texts = [element.encode("utf-8", "surrogateescape") for element in elements]
            return [(f": record {n}", text) for n, text in enumerate(texts, 1)]
        except (ValueError, RecursionError) as error:
            # In a .jsonl the first line may just begin with a bracket, by mistake
            if file.suffix == ".json":
                raise ValueError(f"{file} is damaged: {printable(str(error))}") from error
    # Not splitlines(): it also cuts at characters that JSON allows inside a string
    lines = [(f":{n}", line) for n, line in enumerate(content.split(b"\n"), 1)]
    return [(place, line) for place, line in lines if line.removeprefix(b"\xef\xbb\xbf").strip()]


# What parsing a record can raise, whatever a user wrote into it
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError)


class JsonLines(Source):
    """A folder with `train.jsonl`, optionally `test.jsonl`, and images.

    One object per line, or a JSON array of them, in `train.jsonl` or else `train.json`:
    {"image": "a.png" or ["a.png", "b.png"] or absent, "conversations": [{"from": "human", "value":
    "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}, ...]}. `images` is taken like
    `image`, and `messages` with `role` and `content` like `conversations`. Images come first in a
    document, wherever `<image>` stands in a question; in an answer it is text. A system turn at the
    start is put before every question. Image names are relative to the folder and may not leave it.
    A malformed record raises ValueError, with its line or number, when it is read.
    """

    FORMS = ("jsonl:FOLDER",)
    ASKS = ("human", "user")
    ANSWERS = ("gpt", "assistant")

    def __init__(self, split: str, folder: Path):
        # A .jsonl goes first: beside it, a .json of the same name is often what it was made from
        files = [folder / f"{split}.jsonl", folder / f"{split}.json"]
        found = [file for file in files if file.exists()]
        if not found:
            there = f"there is no {files[0]} (nor {files[1].name})"
            raise FileNotFoundError(f"--data jsonl:{folder}: {there}")
        self.folder = folder.resolve()
        self.file: Path = found[0]
        content = self.file.read_bytes()
        self.content_hash = hashlib.sha256(content).hexdigest()
        self.records = records_of(self.file, content)

    @classmethod
    def open(cls, split: str, argument: str) -> JsonLines:
        return cls(split, at_home(argument))

    @property
    def fingerprint(self) -> str:
        """Of the records. A picture that changes under its name is not noticed."""
        return self.content_hash  # reading all pictures would take as long as an epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        place, line = self.records[index]
        where = f"{self.file}{place}"
        images, turns = self._parsed(where, line)
        system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
        self._check_roles(where, turns)
        asked = [text for _, text in turns[::2]]
        answers = [text.strip() for _, text in turns[1::2]]
        marks = "".join([system, *asked]).count("<image>")
        # None at all is common, and then the pictures come first all the same
        if marks not in (0, len(images)):
            raise ValueError(f"{where}: {marks} times <image> for {len(images)} images")
        # With a mark in the questions for each picture, those in answers are text. Otherwise they
        # may be meant for pictures that the answer shows
        if marks != len(images) and any("<image>" in answer for answer in answers):
            why = "a model here sees pictures and makes none"
            raise ValueError(f"{where}: <image> in an answer: {why}")
        before = system.replace("<image>", "").strip()
        plain = [question.replace("<image>", "").strip() for question in asked]
        # Before every question: with --turns independent each is a document of its own
        questions = ["\n".join(filter(None, [before, question])) for question in plain]
        return Example(where, images, list(zip(questions, answers, strict=True)))

    def _parsed(self, where: str, line: bytes) -> tuple[list[Path], list[tuple[Any, str]]]:
        """Images and (role, text) of each turn. Raises ValueError for anything malformed."""
        try:
            record = json.loads(line.decode("utf-8-sig"))
            images = [self.folder / name for name in images_of(record)]
            turns = turns_of(record)
            # Resolved, so that neither ".." nor a symbolic link leads out of the folder
            outside = [
                path
                for path in dict.fromkeys(images)
                if not path.resolve().is_relative_to(self.folder)
            ]
        # RecursionError: nested too deeply. RuntimeError: a symbolic link to itself
        except MALFORMED as error:
            reason = printable(repr(error))
            raise ValueError(
                f"{where}: not a record in LLaVA's conversation format ({reason})"
            ) from error
        if outside:
            raise ValueError(
                f"{where}: image {printable(str(outside[0]))} lies outside {self.folder}"
            )
        return images, turns

    def _check_roles(self, where: str, turns: list[tuple[Any, str]]) -> None:
        """Raise ValueError unless questions and answers alternate, beginning with a question."""
        roles = [role for role, _ in turns]
        alternate = all(role in self.ASKS for role in roles[::2]) and all(
            role in self.ANSWERS for role in roles[1::2]
        )
        if not roles or len(roles) % 2 or not alternate:
            found = printable(", ".join(map(str, roles)))
            raise ValueError(
                f"{where}: conversations must alternate human and gpt, found: {found or 'nothing'}"
            )

    def pictures(self) -> Pictures:
        return of_files(self._images(index) for index in range(len(self)))

    def _images(self, index: int) -> Sequence[Path]:
        try:
            return self[index].images
        except ValueError:  # the stream names it
            return ()
