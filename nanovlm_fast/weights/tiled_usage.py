"""How pictures become inputs of an exported model with tiles, without this package.

transformers has no processor that cuts pictures and writes image strings as these models read them:
SmolVLM's puts the whole picture last, a line break after each row of tiles and further tokens
around all of it. Model cards therefore hold the source of these functions, which may use only what
the card imports: math, NumPy, torch and Pillow. They repeat data/images.py and data/chat.py, and a
test holds them to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image


def cut(
    image: Image.Image, tile: int, limit: int, enlarge: bool, whole: bool
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Tiles of an RGB picture, (n, 3, tile, tile) from 1 / 255 on, and the rows and columns."""
    if not limit:
        pixels = torch.from_numpy(np.array(image.resize((tile, tile), Image.Resampling.BILINEAR)))
        return pixels.permute(2, 0, 1)[None].float().add(1) / 255, (1, 1)
    long = max(image.size)
    target = limit if enlarge else min(limit, -(-long // tile) * tile)
    scale = target / long
    short = max(math.ceil(min(image.size) * scale / tile) * tile, tile)
    size = (target, short) if image.width >= image.height else (short, target)
    pixels = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BICUBIC)))
    pixels = pixels.permute(2, 0, 1).float()
    columns, rows = size[0] // tile, size[1] // tile
    tiles = pixels.reshape(3, rows, tile, columns, tile).permute(1, 3, 0, 2, 4).flatten(0, 1)
    if whole and rows * columns > 1:
        small = torch.nn.functional.interpolate(
            pixels[None], size=(tile, tile), mode="bilinear", antialias=True
        )
        tiles = torch.cat([small.round().clamp(0, 255), tiles])
    # From 1 / 255 on: transformers takes a tile of zeros, a black one, for padding and drops it.
    return (tiles + 1) / 255, (rows, columns)


def image_string(grids: Sequence[tuple[int, int]], names: Mapping[str, str], tokens: int) -> str:
    """What stands for the pictures in front of the first question."""
    said = ""
    for number, (rows, columns) in enumerate(grids):
        said += f"<image: {number}>" if len(grids) > 1 else ""
        if "global_image_token" in names:
            said += names["global_image_token"] + names["image_token"] * tokens
            if (rows, columns) == (1, 1):
                continue
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                said += names.get(f"r{row}c{column}", "") + names["image_token"] * tokens
    return said
