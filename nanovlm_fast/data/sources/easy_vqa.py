"""easy-VQA: the data of the preset `tiny`, from the PyPI package `easy-vqa`."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

from nanovlm_fast.data.same import Pictures, of_files
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.text import Turn


class EasyVQA(Source):
    """easy-VQA by Victor Zhou: coloured shapes, about ten questions per image."""

    FORMS = ("easy_vqa",)

    def __init__(self, split: str):
        # Imported here: a training step on other data must not need the package
        import easy_vqa

        paths, questions = {
            "train": (easy_vqa.get_train_image_paths, easy_vqa.get_train_questions),
            "test": (easy_vqa.get_test_image_paths, easy_vqa.get_test_questions),
        }[split]
        self.split = split
        # Sorted: the package lists a folder, whose order differs between file systems
        self.paths = sorted(paths().items())
        self.turns: dict[int, list[Turn]] = {image: [] for image, _ in self.paths}
        for question, answer, image in zip(*questions(), strict=True):
            self.turns[image].append((question, answer))

    @classmethod
    def open(cls, split: str, argument: str) -> EasyVQA:
        return cls(split)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(sorted(self.turns.items())).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        image, path = self.paths[index]
        return Example(f"easy_vqa/{self.split}/{image}", [path], self.turns[image])

    def pictures(self) -> Pictures:
        return of_files([Path(path)] for _, path in self.paths)
