"""Images cut into tiles: the sizes, the order of the tiles, their pixels, and what is refused.

The sizes are held against a formula written a second time, on arrays; the pixels of the small
picture of the whole against the triangle filter written as two matrices in float64.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from nanovlm_fast.config import CHATML, VLMConfig
from nanovlm_fast.data.images import BadImage, grid_of, load_image, split_image, tiles_of
from nanovlm_fast.ranges import TokenNames
from tests.support.tiles import token_names

PHOTOGRAPH = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def config_of(
    tile: int = 512, side: int = 2048, to_max: bool = True, **fields: object
) -> VLMConfig:
    names = {"vlm_extra_tokens": token_names(), "lm_chat_template": CHATML, **fields}
    return VLMConfig(
        vit_img_size=tile, max_img_size=side, resize_to_max_side_len=to_max, **names
    ).validate()


def grids(
    widths: np.ndarray, heights: np.ndarray, tile: int, side: int, to_max: bool
) -> np.ndarray:
    """(n, 2) rows and columns by the formula, on arrays of float64."""
    long = np.maximum(widths, heights).astype(np.float64)
    short = np.minimum(widths, heights).astype(np.float64)
    target = np.full_like(long, side) if to_max else np.minimum(side, np.ceil(long / tile) * tile)
    factor = np.divide(target, long)
    scaled = np.multiply(short, factor)
    few = np.maximum(1, np.ceil(np.divide(scaled, tile)))
    many = target / tile
    lying = widths >= heights
    return np.stack([np.where(lying, few, many), np.where(lying, many, few)], 1).astype(int)


@pytest.mark.parametrize(
    ("tile", "side", "to_max"),
    [(512, 2048, True), (512, 2048, False), (384, 2688, False), (64, 512, True)],
)
def test_a_hundred_thousand_sizes_give_the_grids_of_the_formula(tile, side, to_max):
    rng = np.random.default_rng(side + to_max)
    # Half of them of any size up to 20,000, half small, where rounding decides more often
    sizes = np.concatenate([rng.integers(1, 20001, (12500, 2)), rng.integers(1, 700, (12500, 2))])
    config = config_of(tile, side, to_max)
    found = np.array([grid_of(int(width), int(height), config) for width, height in sizes])
    assert np.array_equal(found, grids(sizes[:, 0], sizes[:, 1], tile, side, to_max))
    assert len(np.unique(found, axis=0)) >= 7


@pytest.mark.parametrize(
    ("size", "grid", "tiles"),
    [
        ((640, 480), (3, 4), 13),
        ((480, 640), (4, 3), 13),
        ((700, 700), (4, 4), 17),
        ((364, 273), (4, 4), 17),  # three rows in exact arithmetic
        ((1, 1), (4, 4), 17),
        ((20000, 1), (1, 4), 5),
        ((1, 20000), (4, 1), 5),
    ],
)
def test_sizes_whose_grid_is_known(size, grid, tiles):
    config = config_of()
    assert grid_of(*size, config) == grid
    assert tiles_of(grid, config) == tiles


def test_a_small_image_is_one_tile_where_it_is_not_enlarged():
    config = config_of(to_max=False)
    assert grid_of(512, 300, config) == (1, 1) and tiles_of((1, 1), config) == 1
    assert grid_of(513, 300, config) == (2, 2)
    picture = Image.open(PHOTOGRAPH).crop((0, 0, 300, 200))
    tiles, grid = split_image(picture, config)
    assert grid == (1, 1) and tiles.shape == (1, 3, 512, 512)
    wanted = np.asarray(picture.resize((512, 512), Image.Resampling.BICUBIC))
    assert np.array_equal(tiles[0], wanted.transpose(2, 0, 1))


def test_tiles_lie_row_by_row_behind_the_whole_image():
    """Put together again they are the resized photograph."""
    config = config_of(64, 256)
    photograph = Image.open(PHOTOGRAPH)  # 512 x 600
    tiles, (rows, columns) = split_image(photograph, config)
    assert tiles.dtype == np.uint8 and tiles.flags["C_CONTIGUOUS"]
    assert (rows, columns) == (4, 4) and tiles.shape == (17, 3, 64, 64)
    lines = [
        np.concatenate(list(tiles[1 + columns * row : 1 + columns * (row + 1)]), axis=2)
        for row in range(rows)
    ]
    whole = np.concatenate(lines, axis=1).transpose(1, 2, 0)
    resized = photograph.resize((256, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(whole, np.asarray(resized))


def triangle(long: int, short: int) -> np.ndarray:
    """(short, long) weights of an antialiased bilinear resize."""
    scale = long / short
    centres = (np.arange(short)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(np.arange(long)[None] + 0.5 - centres) / scale, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("tile", "side"), [(512, 2048), (96, 288)])
def test_the_whole_image_is_squashed_within_a_step_of_a_pixel(tile, side):
    photograph = Image.open(PHOTOGRAPH).crop((0, 0, 512, 380))
    config = config_of(tile, side)
    tiles, (rows, columns) = split_image(photograph, config)
    size = (columns * tile, rows * tile)
    resized = np.asarray(photograph.resize(size, Image.Resampling.BICUBIC)).astype(np.float64)
    rows_done = np.tensordot(triangle(size[1], tile), resized, 1)  # (tile, W, 3)
    wanted = np.tensordot(triangle(size[0], tile), rows_done, (1, 1)).transpose(2, 1, 0)
    assert np.abs(tiles[0] - wanted).max() <= 0.501  # of 255: rounding to whole numbers
    assert (rows, columns) == (3, columns) and len(tiles) == 1 + rows * columns


def test_without_a_token_for_it_the_whole_image_is_not_shown():
    names = token_names()
    del names["global_image_token"]
    config = config_of(64, 256, vlm_extra_tokens=names)
    tiles, grid = split_image(Image.open(PHOTOGRAPH), config)
    assert grid == (4, 4) and len(tiles) == 16 == tiles_of(grid, config)


def test_models_that_do_not_cut_get_the_square_of_before():
    config = VLMConfig(vit_img_size=64)
    tiles, grid = split_image(PHOTOGRAPH, config)
    assert grid == (1, 1) == grid_of(512, 600, config)
    assert np.array_equal(tiles, load_image(PHOTOGRAPH, 64)[None])


def encoded(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height), 200).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20000, 3), (2, 20000), (3, 20000)])
def test_extreme_sizes_are_cut(width, height):
    tiles, (rows, columns) = split_image(encoded(width, height), config_of(64, 256))
    assert len(tiles) == rows * columns + 1 and (tiles == 200).all()


def claimed(width: int, height: int) -> bytes:
    """A PNG whose header alone claims that many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(1, 1)[33:]


# With the pytest run's own filters it is a warning; data/images.py makes it an error
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height", "limit"),
    [
        (20000, 20000, "400000000 pixels. exceeds limit of"),
        (20000, 5000, "pixels are over 89478485"),
    ],
)
def test_too_many_pixels_are_refused_with_the_limit(width, height, limit):
    with pytest.raises(BadImage, match=limit) as refusal:
        split_image(claimed(width, height), config_of())
    assert "\n" not in str(refusal.value)


def test_a_grid_without_tokens_is_refused_by_its_place():
    """384 * 8 / 3071... rounds up for some squares: a ninth row."""
    config = config_of(384, 3072)
    assert grid_of(187, 187, config) == (9, 8)
    with pytest.raises(BadImage, match=r"187 x 187 pixels make 9 x 8 tiles.* no r9c8"):
        split_image(Image.new("RGB", (187, 187)), config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": 2000}, "max_img_size = 2000 must be a positive multiple of vit_img_size = 512"),
        ({"side": 512 * 9}, "9 x 9 tiles .* at most 8 x 8"),
        ({"vlm_extra_tokens": {"image_token": "<|image|>"}}, "needs a token for r1c1"),
        ({"vlm_extra_tokens": {}}, "needs a token for image_token"),
        ({"lm_chat_template": ""}, "needs an lm_chat_template: the plain prompt has no place"),
        ({"side": 0}, "resize_to_max_side_len needs a max_img_size"),
        ({"side": -512}, "max_img_size must be a whole number of at least 0"),
    ],
)
def test_models_that_cannot_cut_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(**fields)


def test_names_of_tokens_are_read_from_json_in_their_order():
    names = token_names()
    assert list(TokenNames(json.dumps(names))) == list(names)
    for wrong in ("[1]", "3", '{"image_token": 3}', "null", "{", "[" * 100000):
        with pytest.raises(ValueError):
            TokenNames(wrong)
