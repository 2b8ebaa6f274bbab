"""Images: decode and resize to the model's square, and augmentation that keeps the answers true."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class BadImage(ValueError):
    """An image that cannot be decoded; the message names it."""


def load_image(source: Path | str | bytes | Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8: decoded, turned upright by its EXIF tag, RGB, squashed to a square (bilinear).

    `source` is a file, its bytes, or an open PIL image. Raises BadImage naming the file if it cannot be decoded.
    """
    name = source if isinstance(source, (Path, str)) else type(source).__name__
    try:
        image = (
            source
            if isinstance(source, Image.Image)
            else Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        )
        image = ImageOps.exif_transpose(image).convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"image {name}: {error}") from error


def shift(image: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Move (3, H, W) by (dx, dy) pixels; the border repeats into what is uncovered."""
    height, width = image.shape[1:]
    rows = (np.arange(height) - dy).clip(0, height - 1)
    columns = (np.arange(width) - dx).clip(0, width - 1)
    return image[:, rows[:, None], columns]


def augment(images: np.ndarray, mode: str, rng: np.random.Generator) -> np.ndarray:
    """Augment (n, 3, H, W) uint8: all images of a sample alike, so that what is said of them together stays true.

    'shift': random translation by up to an eighth of the side, and mirror. 'dihedral': one of the square's eight
    symmetries. 'none' returns the images as they are.
    """
    if mode == "none" or len(images) == 0:
        return images
    if mode == "dihedral":
        if rng.random() < 0.5:
            images = images.swapaxes(2, 3)
        images = images[:, :, :: rng.choice((1, -1)), :]
    images = images[..., :: rng.choice((1, -1))]
    if mode == "shift":
        reach = images.shape[-1] // 8
        dx, dy = rng.integers(-reach, reach + 1, 2)
        images = np.stack([shift(image, dx, dy) for image in images])
    return np.ascontiguousarray(images)
