"""Coloured squares made on the fly, for tests and benches: no files, no packages, no network."""

from __future__ import annotations

import numpy as np
from PIL import Image

from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.ranges import Range

# Sides of an image, in pixels. Below 8 the smallest square, an eighth of the side, would be empty
SYNTHETIC = Range(int, least=8, most=2**12)
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "white": (250, 250, 250),
}


class Synthetic(Source):
    """One coloured square per image, with one to three questions about it."""

    FORMS = ("synthetic", "synthetic:IMAGE_SIZE")

    def __init__(self, split: str, size: int = 64):
        self.split = split
        self.size = size
        self.count = {"train": 256, "test": 64}[split]

    @classmethod
    def open(cls, split: str, argument: str) -> Synthetic:
        return cls(split, SYNTHETIC.read("--data synthetic:IMAGE_SIZE", argument or 64))

    @property
    def fingerprint(self) -> str:
        return f"synthetic/{self.split}/{self.size}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        # The generator depends on the index alone, so every worker and every epoch makes the same
        # image. The order of the draws below is part of the data: committed results rest on it
        rng = np.random.default_rng([self.split == "test", index])
        colour = str(rng.choice(list(COLOURS)))
        pixels = np.full((self.size, self.size, 3), rng.integers(90, 160), np.uint8)
        x, y = rng.integers(0, self.size // 2, 2)
        side = rng.integers(self.size // 8, self.size // 2)
        pixels[y : y + side, x : x + side] = COLOURS[colour]
        other = str(rng.choice(list(COLOURS)))
        in_upper_half = y + side // 2 < self.size // 2
        turns = [
            ("what color is the square?", colour),
            (f"is the square {other}?", "yes" if other == colour else "no"),
            (
                "is the square in the upper half of the picture?",
                "yes" if in_upper_half else "no",
            ),
        ]
        return Example(
            f"synthetic/{self.split}/{index}",
            [Image.fromarray(pixels)],
            turns[: int(rng.integers(1, 4))],
        )
