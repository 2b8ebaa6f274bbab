"""Images: decode, resize to the model's square or tiles, augment. All are (3, H, W) uint8 then.

Pixels are normalised on the device (model/packed.py), so bytes are all that is made and copied
here.

How a picture becomes RGB (`to_rgb`) depends on its mode and file, not on what it shows, or similar
pictures would be read differently. (F is the exception: its files do not say their range.) First
the picture is turned upright by its EXIF tag. Of an animation the first frame is read.

| Pillow's mode | becomes |
| --- | --- |
| RGB, L, 1, P, CMYK, YCbCr, HSV, LAB | what Pillow's `convert("RGB")` gives |
| RGBA, LA, PA, RGBa, La; tRNS of a PNG or GIF in P, L, 1, RGB, I;16 | composited onto white |
| I;16, I;16B, I;16L, I;16N; I of a PNG or PPM file: 16 bits of grey | the upper 8 bits |
| I otherwise: 32 bits of grey | clipped to 0..255, as Pillow does |
| F, all values in [0, 1] | times 255, rounded |
| F otherwise | clipped to 0..255; NaN becomes 0 |

Of 16 bits per colour in a PNG the upper 8 are read (Pillow does it), of its tRNS colour too.

A change of these rules changes the pixels of every data set: count up `PIXELS` in
sources/shards.py, so that shards made by the old rules are refused.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from nanovlm_fast.config import VLMConfig

Image.init()
# The formats that are decoded at all. Pillow's others start programs (EPS: Ghostscript) or have no
# signature to recognise them by
KNOWN = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = [name for name in KNOWN if name in Image.OPEN]  # AVIF depends on how Pillow was built
MAX_PIXELS = 89_478_485  # 256 MiB of RGB, where Pillow begins to warn of a decompression bomb
# Once per process: `catch_warnings` around each image would reset which other warnings Python has
# given already, so those would be printed for every image
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


Made = TypeVar("Made")
Grid = tuple[int, int]  # rows and columns of tiles


class BadImage(ValueError):
    """An image that cannot be decoded. The message names it."""


def load_image(source: Path | str | bytes | np.ndarray | Image.Image, size: int) -> np.ndarray:
    """The image as (3, size, size) uint8: upright, RGB, squashed to a square (bilinear).

    `source` is a file, its bytes, an open PIL image, or an array that this function returned for
    that size (prepared data). Raises BadImage, naming the file, if it cannot be decoded.
    """
    if isinstance(source, np.ndarray):
        if source.shape != (3, size, size):
            raise BadImage(f"image of prepared data: {source.shape} and not {(3, size, size)}")
        return source
    return _decoded(source, lambda image: square(image, size))


def rgb(source: Path | str | bytes) -> Image.Image:
    """The picture in its own size: upright, RGB. Raises BadImage if it cannot be decoded."""
    return _decoded(source, to_rgb)


def split_image(
    source: Path | str | bytes | Image.Image, config: VLMConfig
) -> tuple[np.ndarray, Grid]:
    """The image as the model sees it: its tiles, and their grid (rows, columns).

    Tiles are (n, 3, S, S) uint8 with S = vit_img_size, row by row, and before them, if there are
    several and the model has a token for it, the whole image squashed to S x S. Without
    max_img_size there is one tile, the image squashed. `source` is a file, its bytes, or an open
    PIL image. Raises BadImage, naming the file, if it cannot be decoded or cut.
    """
    return _decoded(source, lambda image: _tiles(to_rgb(image), config))


def _decoded(source: Path | str | bytes | Image.Image, use: Callable[[Image.Image], Made]) -> Made:
    """What `use` makes of the image. Raises BadImage, naming the file, if it raises anything."""
    # Bytes have no name; the caller puts that of the example before the message
    name = printable(str(source)) if isinstance(source, (Path, str)) else type(source).__name__
    try:
        return use(source if isinstance(source, Image.Image) else opened(source))
    except Exception as error:
        # As broad as that: decoders let any error of a damaged file out, struct.error and
        # SyntaxError among them. The address of a buffer is cut off, as it differs in each run
        reason = str(error).split(" <_io.BytesIO")[0]
        raise BadImage(f"image {name}: {printable(reason)}") from error


def tiled_size(width: int, height: int, config: VLMConfig) -> tuple[int, int]:
    """(width, height) that an image is stretched to before it is cut into tiles.

    The result depends on how these operations round: 364 x 273 pixels give four rows of tiles,
    where exact arithmetic gives three. Their order is nanoVLM's and must stay.
    """
    tile = config.vit_img_size
    long = max(width, height)
    limit = config.max_img_size
    target = limit if config.resize_to_max_side_len else min(limit, -(-long // tile) * tile)
    scale = target / long
    short = max(math.ceil(min(width, height) * scale / tile) * tile, tile)
    return (target, short) if width >= height else (short, target)


def grid_of(width: int, height: int, config: VLMConfig) -> Grid:
    """(rows, columns) of tiles that an image of this size is cut into, from its size alone."""
    if not config.max_img_size:
        return (1, 1)
    wide, high = tiled_size(width, height, config)
    return (high // config.vit_img_size, wide // config.vit_img_size)


def tiles_of(grid: Grid, config: VLMConfig) -> int:
    """Number of tiles of an image with this grid, the one that shows the whole included."""
    rows, columns = grid
    return rows * columns + (config.has_global_tile and grid != (1, 1))


def _tiles(image: Image.Image, config: VLMConfig) -> tuple[np.ndarray, Grid]:
    """Cut an RGB image. Raises ValueError for a grid that the model has no tokens for."""
    side = config.vit_img_size
    if not config.max_img_size:
        return square(image, side)[None], (1, 1)
    rows, columns = grid_of(image.width, image.height, config)
    # Rounding can add a row to a square image (see tiled_size)
    if f"r{rows}c{columns}" not in config.vlm_extra_tokens:
        raise ValueError(
            f"{image.width} x {image.height} pixels make {rows} x {columns} tiles, and "
            f"vlm_extra_tokens has no r{rows}c{columns}"
        )
    size = (columns * side, rows * side)
    image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image)  # (rows * S, columns * S, 3)
    tiles = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    tiles = tiles.reshape(-1, 3, side, side)
    if tiles_of((rows, columns), config) > len(tiles):
        tiles = np.concatenate([_squashed(pixels, side)[None], tiles])
    return np.ascontiguousarray(tiles), (rows, columns)


def _squashed(pixels: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, side, side) uint8 as torchvision resizes a tensor: antialiased.

    torchvision does it on floats in [0, 1]; these are rounded here, so they differ by up to half a
    step of 1/255. Pillow's own filter rounds between its two passes, and differs by more.
    """
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(
        image, size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return small[0].round().clamp(0, 255).to(torch.uint8).numpy()


def opened(source: Path | str | bytes) -> Image.Image:
    """A file or its bytes as an image that is not decoded yet.

    Raises ValueError for an image that is too large or a path that is not a file, and what Pillow
    raises for other formats.
    """
    # Reading a pipe or a device may never end
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError("no such file")
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    # The header says the size, so this costs no decoding
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are over {MAX_PIXELS}: a decompression bomb?"
        )
    return image


def square(image: Image.Image, size: int) -> np.ndarray:
    """Decode an image to (3, size, size) uint8."""
    image = to_rgb(image)
    # Resized after the conversion: a palette's numbers cannot be interpolated
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# Model cards contain the source of this function, so it may use only NumPy and Pillow, under the
# names that they are imported by above
def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as upright RGB, transparency composited onto white."""
    # How the file stores pixels. Read first: Pillow forgets it when it decodes
    tiles = getattr(image, "tile", None)
    stored = tiles[0][3] if tiles else ""
    stored = str(stored[0] if isinstance(stored, tuple) and stored else stored)
    is_16_bit = image.mode.startswith("I;16") or stored.startswith("I;16")
    is_16_bit |= image.mode == "I" and image.format == "PPM"
    image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")
    if stored in ("L;2", "L;4") and key is not None:  # Pillow scales these pixels, but not the key
        image.info["transparency"] = key * (85 if stored == "L;2" else 17)
    elif image.mode == "RGB" and key is not None and (stored == "RGB;16B" or max(key) > 255):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif image.mode.startswith("I") or image.mode == "F":  # convert() would clip these
        values = np.asarray(image)
        alpha = None if key is None else np.where(values == key, 0, 255).astype(np.uint8)
        if image.mode == "F":
            values = np.nan_to_num(values, nan=0.0)
            values = (values * 255).round() if values.min() >= 0 and values.max() <= 1 else values
        elif is_16_bit:
            values = values.clip(0, 65535) >> (4 if stored == "I;12" else 8)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        if alpha is not None:
            image.putalpha(Image.fromarray(alpha))
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # not in one step
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def printable(text: str, limit: int = 300) -> str:
    """Text from data, fit for one line of a message.

    Line breaks and control characters, which could forge lines or command the terminal, are
    escaped; the middle of a long text is left out.
    """
    text = text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return text if text.isprintable() else repr(text)[1:-1]


def plain_margins(image: np.ndarray) -> tuple[int, int, int, int]:
    """Width of the plain margins of (3, H, W) at (top, bottom, left, right).

    Plain is what has the colour of the top left corner.
    """
    drawn = (image != image[:, :1, :1]).any(0)  # (H, W)
    rows = np.nonzero(drawn.any(1))[0]
    columns = np.nonzero(drawn.any(0))[0]
    if len(rows) == 0:  # nothing is drawn
        return (0, 0, 0, 0)
    return rows[0], len(drawn) - 1 - rows[-1], columns[0], drawn.shape[1] - 1 - columns[-1]


def augment(images: np.ndarray, mode: str, rng: np.random.Generator) -> np.ndarray:
    """Augment (n, 3, H, W) uint8 images of one sample, all mirrored alike.

    Modes: 'none' returns the images as they are. 'shift' moves what is drawn on a plain background
    anywhere inside its margins, and mirrors; a photograph has no margins and is only mirrored.
    'dihedral' takes one of the square's eight symmetries.

    Only the user can know whether the answers stay true: no mode suits questions about places,
    directions or text.
    """
    if mode == "none" or len(images) == 0:
        return images
    if mode == "dihedral":
        if rng.random() < 0.5:
            images = images.swapaxes(2, 3)
        images = images[:, :, :: rng.choice((1, -1)), :]
    images = images[..., :: rng.choice((1, -1))]
    if mode == "shift":
        moved = []
        for image in images:
            # Inside the margins, so what `roll` moves over the edge is plain background
            top, bottom, left, right = plain_margins(image)
            shift = (int(rng.integers(-top, bottom + 1)), int(rng.integers(-left, right + 1)))
            moved.append(np.roll(image, shift, axis=(1, 2)))
        images = np.stack(moved)
    return np.ascontiguousarray(images)  # mirrored views have negative strides; torch takes none
