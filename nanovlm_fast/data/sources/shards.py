"""Prepared shards: samples that prepare.py decoded, resized and tokenised once.

    DIR/manifest.json          what was processed, and how; counts; size and SHA-256 of every shard
    DIR/shard-00000.arrow ...  Arrow IPC files of one record batch each, memory-mapped
    DIR/tokenizer.json ...     the tokenizer of the token ids in the shards

Columns of a shard; a row is one sample of d documents with n tokens in all:

    name        string         the example's name
    images      large binary   (images, 3, size, size) uint8
    input_ids   list of int32  (n,)
    image_rows  list of int32  (n,), -1 for text
    labels      list of int32  (n,), -100 where there is no loss
    lengths     list of int32  (d,)
    grids       list of int32  rows and columns of each image's tiles; only where images are cut
    turns       string         JSON: [[question, answer], ...]
    crc32       uint32         of all the other columns

A row is a sample and not a packed batch. Packing is cheap compared with decoding, and doing it in
the reader keeps what frozen batches would rule out: a new order each epoch, questions and
augmentation drawn anew, any token budget, any number of workers. Shards serve every run with the
same image size, pixel rule, prompt, turns and tokenizer; another run is refused.

Sizes are checked when a folder is opened, and the CRC-32 of a row when a process first reads it.
The SHA-256 are compared only by `prepare --verify`, since reading all files takes as long as an
epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.same import Pictures
from nanovlm_fast.data.sources.example import Example, LoaderError, Source
from nanovlm_fast.data.sources.finevision import RATINGS
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.files import read_json
from nanovlm_fast.packing.documents import IGNORE, Document, Sample
from nanovlm_fast.paths import at_home

FORMAT = 1  # of rows and manifest
# The version of images.to_rgb. Rule 1, which manifests do not name, showed the colours that a
# picture has under its transparent parts: shards made by it hold other pixels and are refused
PIXELS = "rule 2"
# The version of the labels of chat.ChatProcessor. Rule 1, which manifests do not name, left the end
# of an empty last answer without loss
LABELS = "rule 2"
AGAIN = "run the command that prepared it again: it makes only what is missing"


class DamagedShard(LoaderError):
    """A shard that differs from its manifest."""


def processing(model: VLMConfig, text: TextProcessor, train: TrainConfig) -> dict[str, Any]:
    """Everything that decides what a prepared sample holds, besides its data.

    What only some models and runs have is there for these alone: manifests of before stay valid.
    """
    how: dict[str, Any] = {}
    if model.max_img_size:
        how["max_img_size"] = model.max_img_size
        how["resize_to_max_side_len"] = model.resize_to_max_side_len
    if model.lm_chat_template:
        how["vlm_extra_tokens"] = dict(model.vlm_extra_tokens)
        how["prompt_of"] = "ChatML"
        how["labels"] = LABELS
    if train.max_images:
        how["max_images"] = train.max_images
    for name in RATINGS:
        option = f"min_rating_{name}"
        if getattr(train, option) != getattr(TrainConfig, option):
            how[option] = getattr(train, option)
    return how | {
        "vit_img_size": model.vit_img_size,
        "pixels": PIXELS,
        "image_tokens": text.image_tokens,
        "prompt": text.prompt,
        "turns": text.mode,
        "tokenizer": text.tokenizer.fingerprint,
    }


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, read in blocks: a shard need not fit into memory."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def replace_file(file: Path, write: Any) -> None:
    """Let `write(temporary path)` make the file: complete, or not at all."""
    # In the same folder, as a rename across file systems is not atomic. With the process id, as
    # several workers write at once. `prepare.finished` deletes what a killed process left behind
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    write(temporary)
    # Before the rename: after a power cut the name could otherwise stand for an empty file
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def row_of(sample: Sample, turns: list[tuple[str, str]], tiled: bool = False) -> dict[str, Any]:
    """A sample as the columns of a shard; `tiled` where images are cut."""

    def joined(column: str) -> np.ndarray:
        # The empty array, since concatenate refuses an empty list and a sample may have no document
        parts = [np.zeros(0, np.int32)]
        parts += [getattr(document, column) for document in sample.documents]
        return np.concatenate(parts).astype(np.int32)

    row = {
        "name": sample.name,
        "images": sample.images.tobytes(),
        "input_ids": joined("input_ids"),
        "image_rows": joined("image_rows"),
        "labels": joined("labels"),
        "lengths": np.array([len(document) for document in sample.documents], np.int32),
        "turns": json.dumps(turns),
    }
    if tiled:
        row["grids"] = np.array(sample.grids, np.int32).reshape(-1)
    return {**row, "crc32": checksum(row)}


def checksum(row: dict[str, Any]) -> int:
    """CRC-32 of all columns that training reads."""
    crc = zlib.crc32((row["name"] + row["turns"]).encode())
    for name in ("images", "input_ids", "image_rows", "labels", "lengths", "grids"):
        if name in row:
            crc = zlib.crc32(row[name], crc)
    return crc


def check_row(row: dict[str, Any], image_size: int, image_tokens: int, whole: bool = False) -> None:
    """Raise ValueError for a row that `row_of` cannot have written.

    A checksum does not replace this: it is right in a file that was made wrong. On a GPU such a row
    would index memory out of bounds, long after it was read.
    """
    lengths = row["lengths"]
    rows = row["image_rows"]
    n_images = len(row["images"]) // (3 * image_size**2)
    tokens = {len(row[name]) for name in ("input_ids", "image_rows", "labels")}
    # Summed in 64 bits: int32 lengths could wrap around to the right sum
    if tokens != {int(lengths.sum(dtype=np.int64))} or (lengths < 0).any():
        raise ValueError("its lengths do not add up")
    if len(rows) and not (rows.min() >= -1 and rows.max() < n_images * image_tokens):
        raise ValueError("it refers to images that it does not have")
    grids = row.get("grids")
    if grids is not None and (
        len(grids) % 2 or (grids < 1).any() or sum(tiles_per_image(grids, whole)) != n_images
    ):
        raise ValueError("the tiles of its images do not add up")
    if (row["input_ids"] < 0).any() or ((row["labels"] < 0) & (row["labels"] != IGNORE)).any():
        raise ValueError("a token is negative")


def tiles_per_image(grids: np.ndarray, whole: bool) -> list[int]:
    """Tiles of each image, of its rows and columns; `whole`: with one of the whole if it is cut."""
    tiles = grids[::2].astype(np.int64) * grids[1::2]
    return (tiles + (tiles > 1) if whole else tiles).tolist()


def documents_of(row: dict[str, Any], turns: list[tuple[str, str]]) -> list[Document]:
    """The documents of a row: one per turn, or one with all turns."""
    ends = np.cumsum(row["lengths"]).tolist()
    questions = [question for question, _ in turns]
    if len(ends) != len(turns):
        questions = ["\n".join(questions)]  # --turns chat, as TextProcessor.document joins them
    ids = row["input_ids"].astype(np.int64)
    labels = row["labels"].astype(np.int64)
    rows = row["image_rows"]
    cuts = zip([0, *ends][:-1], ends, questions, strict=True)
    return [Document(ids[a:b], rows[a:b], labels[a:b], question) for a, b, question in cuts]


def columns_of_a_shard(tiled: bool) -> Any:
    """The Arrow schema."""
    import pyarrow as pa

    numbers = pa.list_(pa.int32())
    grids = [("grids", numbers)] if tiled else []
    return pa.schema(
        [
            ("name", pa.string()),
            ("images", pa.large_binary()),
            ("input_ids", numbers),
            ("image_rows", numbers),
            ("labels", numbers),
            ("lengths", numbers),
            ("turns", pa.string()),
            ("crc32", pa.uint32()),
            *grids,
        ]
    )


def write_shard(file: Path, rows: list[dict[str, Any]], tiled: bool = False) -> dict[str, Any]:
    """Write the rows that `row_of` made; returns the entry of the shard in the manifest."""
    import pyarrow as pa

    schema = columns_of_a_shard(tiled)

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))

    replace_file(file, write)
    tokens = sum(len(row["input_ids"]) for row in rows)
    entry = {"file": file.name, "samples": len(rows), "tokens": tokens}
    return {**entry, "bytes": file.stat().st_size, "sha256": sha256_of(file)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder.

    Raises FileNotFoundError if the folder holds no finished shards, ValueError if its manifest is
    damaged.
    """
    file = folder / "manifest.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} holds no prepared data (manifest.json): it was not prepared to its end"
        )
    manifest = read_json(file)
    try:
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"format {manifest['format']}, this version reads {FORMAT}: prepare the data again"
            )
        for entry in manifest["shards"]:
            check_entry(folder, entry)
        # Not "pixels": a manifest without it is whole, and `Prepared.check` says what it lacks
        how = manifest["processing"]
        kinds = dict(vit_img_size=int, image_tokens=int, prompt=str, turns=str, tokenizer=str)
        kinds |= dict(vlm_extra_tokens=dict) if "vlm_extra_tokens" in how else {}
        # `type`, as isinstance would take true for an int
        wrong = [
            name for name, kind in kinds.items() if type(how[name]) is not kind or how[name] == 0
        ]
        if wrong:
            raise ValueError(f"processing: {', '.join(wrong)}")
        if not isinstance(manifest["lm_tokenizer"], str):
            raise ValueError("lm_tokenizer")
        return manifest
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{file} is not a manifest of prepared data: {printable(repr(error))}"
        ) from error


def check_entry(folder: Path, entry: dict[str, Any]) -> None:
    """Check the entry of a shard in the manifest.

    Raises ValueError, KeyError or TypeError if it is malformed, ValueError if its file lies outside
    the folder: a manifest may come from elsewhere, and its files are opened.
    """
    name = entry["file"]
    if Path(name).name != name or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the file {name!r} lies outside the folder")
    # Bounded: a JSON number may be too large for the int64 arrays that hold them
    counts = [entry["samples"], entry["bytes"]]
    plausible = all(type(count) is int and 0 <= count < 2**62 for count in counts)
    if not plausible or not isinstance(entry["sha256"], str):
        raise ValueError(f"the entry of {name}")


def misfit(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a shard, judged by its size alone; None for nothing."""
    file = folder / entry["file"]
    if not file.exists():
        return f"{file} is missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"{file} is damaged: {size} bytes instead of {entry['bytes']}"
    return None


class Prepared(Source):
    """The samples that were prepared into a folder, with their tokens (`Example.documents`).

    Raises what `read_manifest` does, and DamagedShard for a file that is missing or of the wrong
    size.
    """

    FORMS = ("prepared:FOLDER",)

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.entries = self.manifest["shards"]
        if wrong := next(filter(None, (misfit(folder, entry) for entry in self.entries)), None):
            raise DamagedShard(f"{wrong}; {AGAIN}")
        self.size = self.manifest["processing"]["vit_img_size"]
        self.tiled = "max_img_size" in self.manifest["processing"]
        self.whole = "global_image_token" in self.manifest["processing"].get("vlm_extra_tokens", ())
        self.ends = np.cumsum([entry["samples"] for entry in self.entries])
        self.shards: dict[int, dict[str, Any]] = {}  # opened by this process
        self.checked = np.zeros(len(self), bool)  # rows whose checksum this process has compared

    @classmethod
    def open(cls, split: str, argument: str) -> Prepared:
        folder = at_home(argument)
        return cls(folder if split == "train" else folder / split)

    @property
    def fingerprint(self) -> str:
        """Made of the checksums in the manifest: reading the shards would take an epoch."""
        each = " ".join(entry["sha256"] for entry in self.entries)
        return hashlib.sha256(each.encode()).hexdigest()

    def pictures(self) -> Pictures:
        """Compare pixels: the pictures' files are not there any more.

        All pictures have the same number of bytes, so seven bytes of each, spread over the picture,
        take the place of a size. The eighth is 0, which keeps the int64 positive (little-endian):
        `Pictures` takes a negative size for an unreadable file. A picture that is cut is compared
        as all of its tiles: plain ones look the same in many pictures.
        """
        examples: list[int] = []
        spans: list[tuple[int, int]] = []  # tiles of each picture, as rows of its example
        few = [np.zeros((0, 8), np.uint8)]
        for index in range(len(self)):
            pixels, cuts = self.tiles(index)
            for first, last in cuts:
                examples.append(index)
                spans.append((first, last))
                one = pixels[first:last].reshape(1, -1)
                some = one[:, self.size // 2 :: max(one.shape[1] // 7, 1)][:, :7]
                few.append(np.pad(some, ((0, 0), (0, 8 - some.shape[1]))))
        shown = np.array(examples, np.int64)
        sizes = np.ascontiguousarray(np.concatenate(few)).view(np.int64).ravel()

        def content(file: int) -> bytes:
            first, last = spans[file]
            return np.asarray(self[int(shown[file])].images)[first:last].tobytes()

        return Pictures(shown, np.arange(len(shown)), sizes, content)

    def tiles(self, index: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """(tiles of an example, (first, last + 1) of each of its pictures).

        The tiles are (n, 3 * size * size) uint8, a view of the file.
        """
        shard, row = self.place(index)
        columns = self.columns(shard)
        pixels = columns["images"](row).reshape(-1, 3 * self.size**2)
        counts = [1] * len(pixels)
        if self.tiled:
            counts = tiles_per_image(columns["grids"](row), self.whole)
        ends = np.cumsum(counts).tolist()
        return pixels, list(zip([0, *ends][:-1], ends, strict=True))

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.entries else 0

    def __getstate__(self) -> dict[str, Any]:
        # A memory map cannot be pickled: each process opens its own
        return {**self.__dict__, "shards": {}}

    def check(self, model: VLMConfig, text: TextProcessor, train: TrainConfig) -> None:
        """Raise ValueError naming the first option that these samples were not processed with."""
        wanted = processing(model, text, train)
        # In the order of `wanted`, then what it does not have at all
        for name in dict.fromkeys([*wanted, *self.manifest["processing"]]):
            had = self.manifest["processing"].get(name)
            if had == wanted.get(name):
                continue
            what = f"{name} {had!r} and not {wanted.get(name)!r}"
            if name == "tokenizer":  # its fingerprint tells a user nothing
                what = "another tokenizer"
            remedy = "prepare the data again, or train with that"
            raise ValueError(f"{self.folder} was prepared with {what}: {remedy}")

    def stored_tokenizer(self, lm_tokenizer: str) -> Tokenizer | None:
        # Another name: the caller loads that one, and `check` compares the two
        if self.manifest["lm_tokenizer"] != lm_tokenizer:
            return None
        return Tokenizer.load(self.folder)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, row = self.place(index)
        columns = self.columns(shard)
        try:
            values = {name: column(row) for name, column in columns.items()}
            # Once per process: the map of a file that is not written to does not change
            if not self.checked[index]:
                if checksum(values) != values["crc32"]:
                    raise ValueError("its checksum differs")
                image_tokens = self.manifest["processing"]["image_tokens"]
                check_row(values, self.size, image_tokens, self.whole)
                self.checked[index] = True
            turns = [(question, answer) for question, answer in json.loads(values["turns"])]
            images = values["images"].reshape(-1, 3, self.size, self.size)
            documents = documents_of(values, turns)
            grids = None
            if self.tiled:
                grids = list(map(tuple, values["grids"].reshape(-1, 2).tolist()))
            return Example(values["name"], images, turns, documents=documents, grids=grids)
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            file = self.folder / self.entries[shard]["file"]
            wrong = f"{file} is damaged: row {row} is not what was written"
            raise DamagedShard(f"{wrong}. Delete the file and {AGAIN}") from error

    def place(self, index: int) -> tuple[int, int]:
        """(shard, row within the shard) of an example."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, int(index - (self.ends[shard - 1] if shard else 0))

    def columns(self, shard: int) -> dict[str, Any]:
        """The columns of a shard as functions of the row, which return views of the file."""
        import pyarrow as pa

        if shard in self.shards:
            return self.shards[shard]
        file = self.folder / self.entries[shard]["file"]
        try:
            # The buffers of the batch keep the map alive after the file is closed
            with pa.memory_map(str(file)) as mapped:
                batch = pa.ipc.open_file(mapped).get_batch(0)
            # Arrow trusts the offsets in a file. A damaged one would read outside the map
            batch.validate(full=True)
            known = batch.schema.equals(columns_of_a_shard(self.tiled))
            if not known or len(batch) != self.entries[shard]["samples"]:
                raise ValueError("its columns or rows are not those that were written")
            if any(column.null_count for column in batch.columns):
                raise ValueError("a value is missing")
        except (pa.ArrowException, ValueError, OSError) as error:
            reason = printable(str(error).splitlines()[0])
            raise DamagedShard(
                f"{file} is damaged: {reason}. Delete the file and {AGAIN}"
            ) from error
        self.shards[shard] = {name: reader(batch.column(name)) for name in batch.schema.names}
        return self.shards[shard]


def reader(column: Any) -> Any:
    """A function from row to value for an Arrow array.

    Numbers and bytes become NumPy views: `column[row].as_py()` would copy every picture. All else
    becomes a Python object.
    """
    import pyarrow as pa

    if pa.types.is_large_binary(column.type):
        _, offsets, data = column.buffers()
        starts = np.frombuffer(offsets, np.int64)
        values = np.frombuffer(data, np.uint8)
    elif pa.types.is_list(column.type):
        starts = column.offsets.to_numpy()
        values = column.values.to_numpy()
    else:
        return lambda row: column[row].as_py()
    return lambda row: values[starts[row] : starts[row + 1]]
