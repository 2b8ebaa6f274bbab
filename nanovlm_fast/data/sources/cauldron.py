"""Data of the Cauldron's schema, from the Hugging Face hub or a local copy, read with `datasets`.

Rows are read in Arrow format, so images stay the bytes of their files until `images.load_image`
decodes them in a worker, where a bad one is named and counted. Access is random, on the
memory-mapped cache of `datasets`: a run addresses its data by position (stream.py) and could not
resume exactly from a source that only goes forward. streamed.py is such a source.

`huggingface_hub` itself repeats requests that time out or meet a busy server, with growing pauses
(HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT limit one attempt).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nanovlm_fast.data.same import Pictures
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.paths import at_home

CAULDRON = "HuggingFaceM4/the_cauldron"
# The configurations that nanoVLM v0.1 trains on; the hub has more
ALL45 = (
    "ai2d aokvqa chart2text chartqa clevr cocoqa datikz diagram_image_to_text docvqa dvqa figureqa "
    "finqa geomverse hateful_memes hitab iam iconqa infographic_vqa intergps localized_narratives "
    "mapqa multihiertt ocrvqa plotqa raven rendered_text robut_sqa robut_wikisql robut_wtq "
    "scienceqa screen2words st_vqa tabmwp tallyqa tat_qa textcaps textvqa tqa vistext visual7w "
    "visualmrc vqarad vqav2 vsr websight"
).split()
BLOCK = 1000  # rows per block where a whole column is read


def read_splits(name: str, config: str | None = None, streaming: bool = False) -> dict[str, Any]:
    """The splits of a data set.

    `name` is a hub name, or a folder of Parquet or Arrow files or written by save_to_disk. In a
    folder, a subfolder called `config` is that configuration. Raises OSError, in one line that
    names what was wanted, if it cannot be reached or read.
    """
    # Imported here: it takes seconds, and a training step on other data must not need it
    import datasets

    folder = at_home(name)
    where = f"{name}:{config}" if config else name
    try:
        if not folder.is_dir():
            return datasets.load_dataset(name, config, streaming=streaming)
        if config and (folder / config).is_dir():
            folder = folder / config
            config = None
        # load_dataset does not read what save_to_disk wrote
        if not any((folder / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            return datasets.load_dataset(str(folder), config, streaming=streaming)
        loaded = datasets.load_from_disk(str(folder))
        splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        if streaming:
            splits = {split: rows.to_iterable_dataset() for split, rows in splits.items()}
        return splits
    except Exception as error:
        # As broad as that: datasets passes on the errors of requests, pyarrow, fsspec and others
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = ""
        if not folder.is_dir():
            hint = ". A local copy works too: a FOLDER of Parquet files or from save_to_disk"
        raise OSError(f"data set {where} could not be loaded: {reason}{hint}") from error


def rows_of(
    splits: dict[str, Any],
    split: str,
    columns: tuple[str, ...],
    where: str,
    optional: tuple[str, ...] = (),
) -> Any:
    """One split in Arrow format, with the wanted columns only, and the `optional` ones it has.

    Raises FileNotFoundError without such a split, and ValueError without such columns; both list
    what the data set has.
    """
    if split not in splits:
        raise FileNotFoundError(
            f"data set {where} has no split {split!r}, only: {', '.join(splits)}"
        )
    rows = splits[split]
    # A streamed data set may have no schema before its first row is read
    found = list(rows.features) if rows.features else list(next(iter(rows), {}))
    if missing := [column for column in columns if column not in found]:
        raise ValueError(
            f"data set {where} has no column {', '.join(missing)}; its columns: {', '.join(found)}"
        )
    # In any other format `datasets` would decode the images here, and stop at the first bad one
    wanted = [*columns, *(column for column in optional if column in found)]
    return rows.select_columns(wanted).with_format("arrow")


def image_bytes(image: Any) -> bytes:
    """The file behind a row's image. Raises ValueError if the row does not hold it."""
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise ValueError(
            "an image without its bytes (save_to_disk and to_parquet write them into the data set)"
        )
    return content


class Cauldron(Source):
    """Data of the Cauldron's schema.

    Columns: `images`, a list of images, and `texts`, a list of {user, assistant, source}. `data` is
    NAME or NAME:CONFIG,CONFIG with a hub name or a folder; `all45` stands for the 45 configurations
    that nanoVLM v0.1 trains on. Their rows follow one another. A row that is not of the schema
    raises ValueError, by name, when it is read.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("images", "texts")
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    TRAIN_ONLY: ClassVar[str] = CAULDRON  # a data set on the hub

    def __init__(self, data: str, split: str):
        # Known without the hub, where finding out would mean to download the training split
        if data.partition(":")[0] == self.TRAIN_ONLY and split != "train":
            raise FileNotFoundError(f"{self.TRAIN_ONLY} has no split {split!r}, only: train")
        self.parts = [
            (where, self.rows_of(read_splits(name, config), split, where))
            for where, name, config in configurations(data)
        ]
        self.data = data
        self.ends = np.cumsum([len(rows) for _, rows in self.parts])

    @classmethod
    def rows_of(cls, splits: dict[str, Any], split: str, where: str) -> Any:
        return rows_of(splits, split, cls.COLUMNS, where, cls.OPTIONAL)

    @classmethod
    def example_of(cls, where: str, row: dict[str, Any], data: str) -> Example:
        """A row of `data` as an example. Raises ValueError, naming `where`, if it is not one."""
        return cauldron_example(where, row)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        where, rows = self.parts[part]
        row = int(index - (self.ends[part - 1] if part else 0))
        (record,) = rows[row].to_pylist()
        return self.example_of(f"{where}/{row}", record, self.data)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the texts and the lengths of the pictures' files, not with the folder."""
        # One digest per column: how the rows are cut into chunks differs between Parquet files and
        # caches and must not matter
        digests: defaultdict[str, Any] = defaultdict(hashlib.sha256)
        for _, rows in self.parts:
            for batch in rows.iter(BLOCK):
                for name, array in self._columns(batch):
                    digests[name].update(array)
        each = "".join(digests[name].hexdigest() for name in sorted(digests))
        return hashlib.sha256(each.encode()).hexdigest()

    @staticmethod
    def _columns(batch: Any) -> Iterator[tuple[str, bytes | memoryview]]:
        for chunk in batch["images"].chunks:
            counts, sizes = picture_sizes(chunk)
            yield "counts", counts.tobytes()
            yield "sizes", sizes.tobytes()
        for chunk in batch["texts"].chunks:
            yield from text_columns(chunk)

    def pictures(self) -> Pictures:
        """Compare the pictures' files, by length and then by content."""
        blocks = []
        for _, rows in self.parts:
            for batch in rows.select_columns(["images"]).iter(BLOCK):
                blocks += [picture_sizes(chunk) for chunk in batch["images"].chunks]
        none = np.zeros(0, np.int64)
        counts, sizes = (np.concatenate([none, *parts]) for parts in zip(*blocks, strict=True))
        starts = np.cumsum(counts) - counts

        def content(file: int) -> bytes:
            example = int(np.searchsorted(starts, file, "right")) - 1
            return self[example].images[file - int(starts[example])]

        examples = np.repeat(np.arange(len(counts)), counts)
        return Pictures(examples, np.arange(len(sizes)), sizes, content)


def text_columns(texts: Any) -> Iterator[tuple[str, bytes | memoryview]]:
    """(name, bytes) of the text in an Arrow column of turns.

    The bytes are read in place: as Python objects, those of a large data set would take a minute.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        turns = texts.flatten()
        said = {name: pc.struct_field(turns, name) for name in ("user", "assistant")}
        columns = {name: column.cast(pa.large_binary()) for name, column in said.items()}
    except (AttributeError, pa.ArrowException):
        # Not of the schema. This is no place to refuse it: each row does, by name, when it is read
        yield "texts", repr(texts.to_pylist())[1:-1].encode(errors="replace") + b","
        return
    # Lengths as well as bytes: "ab" + "c" must not equal "a" + "bc"
    yield "turns", pc.list_value_length(texts).fill_null(0).cast(pa.int64()).to_numpy().tobytes()
    for name, column in columns.items():
        lengths = pc.binary_length(column).fill_null(-1).cast(pa.int64())
        yield f"{name} lengths", lengths.to_numpy().tobytes()
        _, offsets, content = column.buffers()
        # A chunk may be a slice of its buffers, so only its own part of them counts
        ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        if content is not None and len(ends):
            yield name, memoryview(content)[int(ends[0]) : int(ends[-1])]


def picture_sizes(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """(pictures per row, length of each picture's file or -1) of an Arrow column.

    Only the offsets are read, not the pictures.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_list(images.type) or pa.types.is_large_list(images.type)):
        # Not of the schema: each row says so when it is read
        return np.zeros(len(images), np.int64), np.zeros(0, np.int64)
    counts = pc.list_value_length(images).fill_null(0).cast(pa.int64()).to_numpy()
    files = images.flatten()
    if pa.types.is_struct(files.type):
        known = files.type.get_field_index("bytes") >= 0
        files = pc.struct_field(files, "bytes") if known else files
    if not (pa.types.is_binary(files.type) or pa.types.is_large_binary(files.type)):
        return counts, np.full(len(files), -1, np.int64)
    sizes = pc.binary_length(files).fill_null(-1).cast(pa.int64()).to_numpy()
    return counts, sizes


def configurations(data: str) -> list[tuple[str, str, str | None]]:
    """(label, name, configuration) of each part of NAME or NAME:CONFIG,CONFIG."""
    name, _, configs = data.partition(":")
    names = ALL45 if configs == "all45" else [config for config in configs.split(",") if config]
    label = Path(name).name
    return [(f"{label}/{config}", name, config) for config in names] or [(label, name, None)]


def cauldron_example(where: str, row: dict[str, Any]) -> Example:
    """A row as an example.

    Raises ValueError, which names `where`, if it is not of the Cauldron's schema.
    """
    try:
        images = [image_bytes(image) for image in row["images"] or []]
        turns = [(turn["user"], turn["assistant"]) for turn in row["texts"]]
        if not turns or not all(isinstance(text, str) for turn in turns for text in turn):
            raise ValueError("texts must hold at least one {user, assistant}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a record of the Cauldron's schema ({error})") from error
    return Example(where, images, turns)
