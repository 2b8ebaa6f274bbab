"""easy-VQA on large canvases: the data of the preset `tiny-split`, made on the fly.

A canvas has up to 4 x 4 cells of the size of a picture of easy-VQA, which lies in a random one of
them. Squashed to one square of 64 pixels, as a model without tiles sees it, a shape is 2 to 8
pixels wide, and whether it is a circle or a triangle is hard to tell. Cut into tiles of 64 pixels,
it is as large as ever in one of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from nanovlm_fast.data.same import Pictures, of_files
from nanovlm_fast.data.sources.easy_vqa import EasyVQA
from nanovlm_fast.data.sources.example import Example
from nanovlm_fast.data.text import Turn

SIDE = 64  # pixels of a picture
# Width and height of a canvas, in pictures. The longer side is always 4
CANVASES = ((4, 4), (4, 3), (3, 4), (4, 2), (2, 4))
# Canvases per picture. Training: places instead of epochs, so that no canvas is seen twice
COPIES = {"train": 10, "test": 1}


class EasyVQACanvas(EasyVQA):
    """Canvases with one picture of easy-VQA each, and the questions about it."""

    FORMS = ("easy_vqa_canvas",)

    def __len__(self) -> int:
        return len(self.paths) * COPIES[self.split]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        _, path = self.paths[index % len(self.paths)]
        canvas = paste(Path(path), np.random.default_rng([self.split == "test", index]))
        return Example(f"easy_vqa_canvas/{self.split}/{index}", [canvas], self.turns_of(index))

    def turns_of(self, index: int) -> list[Turn]:
        image, _ = self.paths[index % len(self.paths)]
        return self.turns[image]

    @property
    def fingerprint(self) -> str:
        return f"canvas/{COPIES[self.split]}/{super().fingerprint}"

    def pictures(self) -> Pictures:
        """All canvases of a picture count as the same picture."""
        names = [Path(path) for _, path in self.paths]
        return of_files([names[index % len(names)]] for index in range(len(self)))


def paste(path: Path, rng: np.random.Generator) -> Image.Image:
    """A canvas of a plain light colour with the picture in one of its cells, perhaps mirrored."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    wide, high = CANVASES[rng.integers(len(CANVASES))]
    background = tuple(int(level) for level in rng.integers(225, 256, 3))
    canvas = Image.new("RGB", (wide * SIDE, high * SIDE), background)
    place = (int(rng.integers(wide)) * SIDE, int(rng.integers(high)) * SIDE)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas.paste(picture, place)
    return canvas
