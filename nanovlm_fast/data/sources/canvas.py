"""easy-VQA on canvases: the data of the preset `tiny-split`, made on the fly.

A canvas has up to 4 x 4 cells of the size of a picture of easy-VQA, which lies in a random one of
them. Squashed to one square of 64 pixels, as a model without tiles sees it, a shape of a large
canvas is 2 to 8 pixels wide, and whether it is a circle or a triangle is hard to tell. Cut into
tiles of 64 pixels, it is as large as ever in one of them.

The canvases of the test split are all large. Those of the training split have all sizes, as the
pictures of other data sets have: shapes are learnt on small ones, which cost few tiles, and where
to look is learnt on large ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from nanovlm_fast.data.images import augment
from nanovlm_fast.data.same import Pictures, of_files
from nanovlm_fast.data.sources.easy_vqa import EasyVQA
from nanovlm_fast.data.sources.example import Example
from nanovlm_fast.data.text import Turn

SIDE = 64  # pixels of a picture
# Width and height of a canvas, in pictures. In training each is 1 with a probability of 0.8: with
# large canvases alone, a model learns the colours and not the shapes (bench/NOTES.md)
TRAIN_SIDES = (*12 * (1,), 2, 3, 4)
# The longer side of a test canvas is always 4
TEST_SIZES = ((4, 4), (4, 3), (3, 4), (4, 2), (2, 4))
# Canvases per picture. Training: places instead of epochs, so that no canvas is seen twice
COPIES = {"train": 15, "test": 1}


class EasyVQACanvas(EasyVQA):
    """Canvases with one picture of easy-VQA each, and the questions about it."""

    FORMS = ("easy_vqa_canvas",)

    def __len__(self) -> int:
        return len(self.paths) * COPIES[self.split]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        _, path = self.paths[index % len(self.paths)]
        rng = np.random.default_rng([self.split == "test", index])
        canvas = paste(Path(path), self.size(rng), rng)
        return Example(f"easy_vqa_canvas/{self.split}/{index}", [canvas], self.turns_of(index))

    def size(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw the width and height of a canvas, in pictures."""
        if self.split == "test":
            return TEST_SIZES[rng.integers(len(TEST_SIZES))]
        return int(rng.choice(TRAIN_SIDES)), int(rng.choice(TRAIN_SIDES))

    def turns_of(self, index: int) -> list[Turn]:
        image, _ = self.paths[index % len(self.paths)]
        return self.turns[image]

    @property
    def fingerprint(self) -> str:
        sizes = TEST_SIZES if self.split == "test" else TRAIN_SIDES
        return f"canvas/{COPIES[self.split]}/{sizes}/{super().fingerprint}"

    def pictures(self) -> Pictures:
        """All canvases of a picture count as the same picture."""
        names = [Path(path) for _, path in self.paths]
        return of_files([names[index % len(names)]] for index in range(len(self)))


def paste(path: Path, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A canvas of a plain light colour with the picture in one of its cells.

    `size` is the canvas' width and height in cells. What is drawn is moved inside the picture's
    margins and perhaps mirrored, which changes no answer.
    """
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB")).transpose(2, 0, 1)
    (moved,) = augment(pixels[None], "shift", rng)
    wide, high = size
    background = tuple(int(level) for level in rng.integers(225, 256, 3))
    canvas = Image.new("RGB", (wide * SIDE, high * SIDE), background)
    place = (int(rng.integers(wide)) * SIDE, int(rng.integers(high)) * SIDE)
    canvas.paste(Image.fromarray(np.ascontiguousarray(moved.transpose(1, 2, 0))), place)
    return canvas
