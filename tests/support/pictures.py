"""Pictures as data sets have them, and data sets made from them.

The data sets have the schemas of the Cauldron and of MMStar.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@cache
def photograph(width: int = 320, height: int = 240, place: int = 0) -> Image.Image:
    """A cut of the portrait of Grace Hopper that matplotlib ships."""
    from matplotlib import get_data_path

    with Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg") as portrait:
        left, top = np.random.default_rng(place).integers(0, 200, 2)
        return portrait.crop((left, top, left + 312, top + 234)).resize((width, height))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    """Files of every kind that real data sets hold."""
    photo, turned = photograph(), Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": encoded(photo, "JPEG"),
        "png": encoded(photo, "PNG"),
        "grey": encoded(photo.convert("L"), "JPEG"),
        "palette": encoded(photo.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "rgba": encoded(photo.convert("RGBA"), "PNG"),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "exif": encoded(photo.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned),
        "dot": encoded(photo.resize((1, 1)), "PNG"),
        "strip": encoded(photo.resize((8000, 200)), "JPEG"),
    }


def texts(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"user": question, "assistant": answer, "source": "made"} for question, answer in turns]


def cauldron(rows: list[tuple[list[bytes | None], list[dict[str, str]]]]) -> Any:
    """A data set of the Cauldron's schema, made by `datasets`."""
    from datasets import Dataset, Features, Image, Sequence, Value

    text = {name: Value("string") for name in ("user", "assistant", "source")}
    features = Features({"images": Sequence(Image()), "texts": [text]})
    images = [[{"bytes": content, "path": None} for content in row] for row, _ in rows]
    return Dataset.from_dict(
        {"images": images, "texts": [turns for _, turns in rows]}, features=features
    )


def easy_vqa_rows(count: int) -> list[tuple[list[bytes], list[dict[str, str]]]]:
    """Rows with easy-VQA's first pictures, and their questions as turns."""
    from nanovlm_fast.data.sources.easy_vqa import EasyVQA

    source = EasyVQA("train")
    return [
        ([Path(source[i].images[0]).read_bytes()], texts(*source[i].turns)) for i in range(count)
    ]


def mmstar(rows: list[tuple[str, str, str]]) -> Any:
    """A data set of MMStar's schema with (question, answer, category) rows."""
    from datasets import Dataset, Features, Image, Value

    names = ("index", "question", "image", "answer", "category", "l2_category", "meta_info")
    features = Features({name: Value("string") for name in names})
    features |= {"index": Value("int64"), "image": Image()}
    features["meta_info"] = {
        "source": Value("string"),
        "split": Value("string"),
        "image_path": Value("string"),
    }
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for i, (question, answer, category) in enumerate(rows):
        image = {"bytes": encoded(photograph(place=i), "JPEG"), "path": None}
        meta = {"source": "made", "split": "val", "image_path": f"images/{i}.jpg"}
        for name, value in zip(
            names, (i, question, image, answer, category, "l2", meta), strict=True
        ):
            columns[name].append(value)
    return Dataset.from_dict(columns, features=Features(features))
