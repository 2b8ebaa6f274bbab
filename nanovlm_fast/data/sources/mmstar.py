"""MMStar, a benchmark of multiple-choice questions, and how it is scored."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property

from nanovlm_fast.data.sources.cauldron import image_bytes, read_splits, rows_of
from nanovlm_fast.data.sources.example import Example, Scoring, Source

MMSTAR = "Lin-Chen/MMStar"


def names_letter(reply: str, answer: str) -> bool:
    """Whether the reply names the letter: as a word, before punctuation, or in parentheses.

    These are nanoVLM v0.1's rules. The second is covered by the first and is kept so that the list
    can be compared with nanoVLM's. Only the answer's case is folded, as there: 'b' is wrong.
    """
    letter = re.escape(answer.strip().upper())
    forms = (rf"\b{letter}\b", rf"\b{letter}[.,)]", rf"\(.*{letter}.*\)")
    return any(re.search(form, reply) for form in forms)


class MMStar(Source):
    """MMStar (Chen et al. 2024): 1,500 multiple-choice questions that need the image.

    `name` is the hub's, or the folder of a copy. Columns: question, image, answer (a letter),
    category, and others. Only one split is published, so 'train' and 'test' give the same rows.
    """

    FORMS = ("mmstar", "mmstar:FOLDER")
    ON_HUB = True

    # Asked and judged as nanoVLM v0.1 does while it trains, so that scores compare
    scoring = Scoring(
        prompt="Question: {question} \nAnswer only with the letter! \nAnswer:",
        reply_tokens=5,
        right=names_letter,
    )

    def __init__(self, name: str = MMSTAR):
        splits = read_splits(name)
        split = "val" if "val" in splits else next(iter(splits))
        self.rows = rows_of(splits, split, ("question", "image", "answer", "category"), name)

    @classmethod
    def open(cls, split: str, argument: str) -> MMStar:
        return cls(argument or MMSTAR)

    @cached_property
    def fingerprint(self) -> str:
        said = self.rows.select_columns(["question", "answer"])[:].to_pydict()
        return hashlib.sha256(repr(said).encode(errors="replace")).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        (row,) = self.rows[int(index)].to_pylist()
        try:
            return Example(
                f"MMStar/{index}",
                [image_bytes(row["image"])],
                [(str(row["question"]), str(row["answer"]))],
                kind=str(row["category"]),
            )
        except ValueError as error:
            raise ValueError(f"MMStar/{index}: {error}") from error
