"""easy-VQA."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nanovlm_fast.data.same import Pictures, of_files
from nanovlm_fast.data.sources.example import Example
from nanovlm_fast.data.text import Turn


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
