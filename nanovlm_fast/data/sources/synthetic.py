"""Coloured squares made on the fly."""

from __future__ import annotations

import numpy as np
from PIL import Image

from nanovlm_fast.data.sources.example import Example
from nanovlm_fast.ranges import Range

SYNTHETIC = Range(int, least=8, most=2**12)  # sides of an image; a square's is an eighth or more
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "white": (250, 250, 250),
}


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
            (
                "is the square in the upper half of the picture?",
                "yes" if y + side // 2 < self.size // 2 else "no",
            ),
        ]
        return Example(
            f"synthetic/{self.split}/{index}",
            [Image.fromarray(pixels)],
            turns[: int(rng.integers(1, 4))],
        )
