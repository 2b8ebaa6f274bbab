"""MMStar, and how it is scored."""

from __future__ import annotations

import hashlib
import re

from nanovlm_fast.data.sources.cauldron import (
    image_bytes,
    read_splits,
    rows_of,
)
from nanovlm_fast.data.sources.example import Example

MMSTAR = "Lin-Chen/MMStar"


class MMStar:
    """MMStar (Chen et al. 2024, Lin-Chen/MMStar): 1,500 multiple-choice questions that need the image.

    `name` is the hub's, or the folder of a copy. Columns: question, image, answer (a letter), category, and others.
    Asked and judged as nanoVLM v0.1 does while it trains.
    """

    prompt = "Question: {question} \nAnswer only with the letter! \nAnswer:"
    reply_tokens = 5

    @staticmethod
    def right(reply: str, answer: str) -> bool:
        """Whether the reply names the letter: as a word, before punctuation, or somewhere in parentheses."""
        letter = re.escape(answer.strip().upper())
        return any(
            re.search(form, reply)
            for form in (rf"\b{letter}\b", rf"\b{letter}[.,)]", rf"\(.*{letter}.*\)")
        )

    def __init__(self, name: str = MMSTAR):
        splits = read_splits(name)
        split = "val" if "val" in splits else next(iter(splits))
        self.rows = rows_of(splits, split, ("question", "image", "answer", "category"), name)
        said = self.rows.select_columns(["question", "answer"])[:].to_pydict()
        self.fingerprint = hashlib.sha256(repr(said).encode(errors="replace")).hexdigest()

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
