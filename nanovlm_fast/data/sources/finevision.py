"""FineVision: The Cauldron's schema with ratings, from the Hugging Face hub or a local copy.

A row, of which the ratings may be absent, null, or null for a turn:

    images   [image, ...] or null; in a folder of JSON files the names of pictures in that folder
    texts    [{"user": "What is it?", "assistant": "A cat."}, ...]
    relevance_ratings, image_correspondence_ratings, visual_dependency_ratings, formatting_ratings
             [5, 1, ...], one for each of the texts
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from nanovlm_fast.data.images import printable
from nanovlm_fast.data.same import Pictures, of_files
from nanovlm_fast.data.sources.cauldron import Cauldron, image_bytes
from nanovlm_fast.data.sources.example import Example
from nanovlm_fast.data.text import Turn
from nanovlm_fast.paths import at_home

FINEVISION = "HuggingFaceM4/FineVision_concat_shuffled_2"
# The names that options and counts have for them: --min-rating-relevance and so on
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")


class FineVision(Cauldron):
    """Data of FineVision's schema: FOLDER or OWNER/NAME, either with :CONFIG,CONFIG.

    A row that is not of the schema raises ValueError, by name, when it is read.
    """

    FORMS = ("finevision", "finevision:FOLDER")
    ON_HUB = True
    OPTIONAL: ClassVar[tuple[str, ...]] = tuple(f"{name}_ratings" for name in RATINGS)
    TRAIN_ONLY: ClassVar[str] = FINEVISION

    @classmethod
    def open(cls, split: str, argument: str) -> FineVision:
        return cls(argument or FINEVISION, split)

    @classmethod
    def example_of(cls, where: str, row: dict[str, Any], data: str) -> Example:
        return finevision_example(where, row, folder_of(data))

    def pictures(self) -> Pictures:
        """Compare the pictures' files, also where the rows only name them."""
        rows = [rows for _, rows in self.parts]
        if not any(_names_files(part) for part in rows):
            return super().pictures()
        return of_files(self._files(index) for index in range(len(self)))

    def _files(self, index: int) -> list[Path]:
        try:
            return [image for image in self[index].images if isinstance(image, Path)]
        except ValueError:  # the stream names it
            return []


def _names_files(rows: Any) -> bool:
    """Whether the column of images holds text, which can only be names."""
    feature = getattr(rows.features["images"], "feature", None)
    return getattr(feature, "dtype", None) == "string"


@cache
def folder_of(data: str) -> Path | None:
    """The folder of a data set on this machine, in which rows may name pictures."""
    place = at_home(data.partition(":")[0])
    return place.resolve() if place.is_dir() else None


def finevision_example(where: str, row: dict[str, Any], folder: Path | None) -> Example:
    """A row as an example. Raises ValueError, which names `where`, if it is not of the schema."""
    try:
        images = [_image(image, folder) for image in row["images"] or []]
        turns = [_turn(number, turn) for number, turn in enumerate(row["texts"] or [], 1)]
        if not turns:
            raise ValueError("texts must hold at least one {user, assistant}")
        ratings = {name: _ratings(name, row, len(turns)) for name in RATINGS}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = printable(str(error) if isinstance(error, ValueError) else repr(error))
        raise ValueError(f"{where}: not a record of FineVision's schema ({reason})") from error
    given = {name: of_turns for name, of_turns in ratings.items() if of_turns}
    return Example(where, images, turns, ratings=given)


def _image(image: Any, folder: Path | None) -> bytes | Path:
    """The bytes of an image, or its file in the folder. Raises ValueError without either."""
    name = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if not isinstance(name, str) or folder is None:
        return image_bytes(image)
    # Resolved, so that neither ".." nor a symbolic link leads out of the folder
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        raise ValueError(f"image {name} lies outside {folder}")
    return file


def _turn(number: int, turn: dict[str, Any]) -> Turn:
    """(question, answer) of one of the texts."""
    if turn.get("user") is None and turn.get("assistant") is not None:
        raise ValueError(f"turn {number} starts with the assistant: nobody asked")
    question, answer = turn["user"], turn["assistant"]
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(f"turn {number} must be a text of the user and one of the assistant")
    for text in (question, answer):
        text.encode()  # raises for half a surrogate pair
    return question, answer


def _ratings(name: str, row: dict[str, Any], turns: int) -> list[float | None]:
    """One of the ratings of each turn; empty if the row has none."""
    given = row.get(f"{name}_ratings")
    if given is None or given == []:
        return []
    if not isinstance(given, list) or len(given) != turns:
        raise ValueError(f"{name}_ratings must be a list with one for each of the {turns} texts")
    for rating in given:
        # `type`, as isinstance would take true for an int
        if rating is not None and type(rating) not in (int, float):
            raise ValueError(f"{name}_ratings: {rating!r} is not a number")
    return given
