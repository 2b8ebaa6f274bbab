"""Prepared shards: samples decoded, resized and tokenised once (prepare.py), and read back with none of that.

    DIR/manifest.json            what was processed, and how; counts; size and SHA-256 of every shard
    DIR/shard-00000.arrow ...    Arrow IPC files of one record batch each, memory-mapped: pixels as uint8, token ids
    DIR/tokenizer.json ...       the tokenizer of those ids

A row is a sample, not a packed batch. Packing costs next to nothing beside decoding, and left to the reader it keeps
what frozen batches would take away: another order each epoch, questions and augmentation drawn anew, any token budget,
any number of workers. Shards serve every run with the same image size, prompt, turns and tokenizer; another is refused.

Sizes are checked when a folder is opened, and a row's CRC-32 when a process first reads it: reading all files to
compare their SHA-256 would cost an epoch (`prepare --verify` does it).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from nanovlm_fast.data.images import printable
from nanovlm_fast.data.same import Pictures
from nanovlm_fast.data.sources.example import Example
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.files import read_json
from nanovlm_fast.packing.documents import IGNORE, Document, Sample

FORMAT = 1  # of rows and manifest
PIXELS = "rule 2"  # of images.to_rgb; the first, without a name, showed colours under transparency
AGAIN = "run the command that prepared it again: it makes only what is missing"


class DamagedShard(OSError):
    """A shard that is not what its manifest says. One line, also when a data loader's worker hands it on."""

    def __init__(self, message: str):
        super().__init__(message.rstrip().rsplit(f"{type(self).__name__}: ", 1)[-1])


def processing(image_size: int, text: TextProcessor) -> dict[str, Any]:
    """Everything that decides what a prepared sample holds, besides its data."""
    return {
        "vit_img_size": image_size,
        "pixels": PIXELS,
        "image_tokens": text.image_tokens,
        "prompt": text.prompt,
        "turns": text.mode,
        "tokenizer": text.tokenizer.fingerprint,
    }


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def replace_file(file: Path, write: Any) -> None:
    """Let `write(temporary path)` make the file: it is there whole, or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    write(temporary)
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, file)


def row_of(sample: Sample, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A sample as the columns of a shard."""
    joined = {
        name: np.concatenate(
            [np.zeros(0, np.int32), *(getattr(d, name) for d in sample.documents)]
        ).astype(np.int32)
        for name in ("input_ids", "image_rows", "labels")
    }
    row = {
        "name": sample.name,
        "images": sample.images.tobytes(),
        **joined,
        "lengths": np.array([len(document) for document in sample.documents], np.int32),
        "turns": json.dumps(turns),
    }
    return {**row, "crc32": checksum(row)}


def checksum(row: dict[str, Any]) -> int:
    """CRC-32 over all that training reads of a row."""
    crc = zlib.crc32((row["name"] + row["turns"]).encode())
    for name in ("images", "input_ids", "image_rows", "labels", "lengths"):
        crc = zlib.crc32(row[name], crc)
    return crc


def check_row(row: dict[str, Any], image_size: int, image_tokens: int) -> None:
    """Raise ValueError for a row that no `row_of` writes, whatever its checksum: training would index past its end."""
    lengths, rows, n_images = (
        row["lengths"],
        row["image_rows"],
        len(row["images"]) // (3 * image_size**2),
    )
    whole = {
        int(lengths.sum(dtype=np.int64)),
        *(len(row[name]) for name in ("input_ids", "image_rows", "labels")),
    }
    if len(whole) > 1 or (lengths < 0).any():
        raise ValueError("its lengths do not add up")
    if len(rows) and not (rows.min() >= -1 and rows.max() < n_images * image_tokens):
        raise ValueError("it points at images that it has not")
    if (row["input_ids"] < 0).any() or ((row["labels"] < 0) & (row["labels"] != IGNORE)).any():
        raise ValueError("a token is negative")


def documents_of(row: dict[str, Any], turns: list[tuple[str, str]]) -> list[Document]:
    """A row's documents: one a turn, or one with all turns."""
    ends = np.cumsum(row["lengths"]).tolist()
    questions = [question for question, _ in turns]
    if len(ends) != len(turns):
        questions = ["\n".join(questions)]
    ids, labels, rows = (
        row["input_ids"].astype(np.int64),
        row["labels"].astype(np.int64),
        row["image_rows"],
    )
    cuts = zip([0, *ends[:-1]], ends, questions, strict=True)
    return [Document(ids[a:b], rows[a:b], labels[a:b], question) for a, b, question in cuts]


def columns_of_a_shard() -> Any:
    """The Arrow schema."""
    import pyarrow as pa

    numbers = pa.list_(pa.int32())
    return pa.schema(
        [
            ("name", pa.string()),
            ("images", pa.large_binary()),
            ("input_ids", numbers),
            ("image_rows", numbers),
        ]
        + [
            ("labels", numbers),
            ("lengths", numbers),
            ("turns", pa.string()),
            ("crc32", pa.uint32()),
        ]
    )


def write_shard(file: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write rows of `row_of`; returns the shard's entry in the manifest."""
    import pyarrow as pa

    schema = columns_of_a_shard()

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))

    replace_file(file, write)
    tokens = sum(len(row["input_ids"]) for row in rows)
    entry = {"file": file.name, "samples": len(rows), "tokens": tokens}
    return {**entry, "bytes": file.stat().st_size, "sha256": sha256_of(file)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError if the folder holds no finished shards, ValueError if its manifest is damaged."""
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
        how = manifest["processing"]
        kinds = dict(vit_img_size=int, image_tokens=int, prompt=str, turns=str, tokenizer=str)
        if wrong := [
            name for name, kind in kinds.items() if type(how[name]) is not kind or how[name] == 0
        ]:
            raise ValueError(f"processing: {', '.join(wrong)}")
        if not isinstance(manifest["lm_tokenizer"], str):
            raise ValueError("lm_tokenizer")
        return manifest
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{file} is not a manifest of prepared data: {printable(repr(error))}"
        ) from error


def check_entry(folder: Path, entry: dict[str, Any]) -> None:
    """Raise an error if a shard's entry in the manifest is no such entry, or its file lies outside the folder."""
    name, counts = entry["file"], [entry["samples"], entry["bytes"]]
    if Path(name).name != name or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the file {name!r} lies outside the folder")
    if not all(type(count) is int and 0 <= count < 2**62 for count in counts) or not isinstance(
        entry["sha256"], str
    ):
        raise ValueError(f"the entry of {name}")


def misfit(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a shard, as far as its size tells."""
    file = folder / entry["file"]
    if not file.exists():
        return f"{file} is missing"
    size = file.stat().st_size
    return (
        None
        if size == entry["bytes"]
        else f"{file} is damaged: {size} bytes instead of {entry['bytes']}"
    )


class Prepared:
    """The samples that were prepared into a folder, with their tokens (`Example.documents`) and pixels.

    Raises what `read_manifest` does, and DamagedShard for a file that is missing or has not its size.
    """

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        self.entries = self.manifest["shards"]
        if wrong := next(filter(None, (misfit(folder, entry) for entry in self.entries)), None):
            raise DamagedShard(f"{wrong}; {AGAIN}")
        self.size = self.manifest["processing"]["vit_img_size"]
        self.ends = np.cumsum([entry["samples"] for entry in self.entries])
        self.shards: dict[int, dict[str, Any]] = {}  # opened by this process
        self.checked = np.zeros(len(self), bool)  # by this process

    @property
    def fingerprint(self) -> str:
        """Changes with what the shards hold, as far as their checksums tell."""
        each = " ".join(entry["sha256"] for entry in self.entries)
        return hashlib.sha256(each.encode()).hexdigest()

    def pictures(self) -> Pictures:
        """Pixels that are the same. All have one size, so a few bytes of each stand for it."""
        examples, few = [], [np.zeros((0, 8), np.uint8)]
        for index in range(len(self)):
            shard, row = self.place(index)
            columns = self.shards.get(shard) or self.open(shard)
            pixels = columns["images"](row).reshape(-1, 3 * self.size**2)
            examples += [index] * len(pixels)
            some = pixels[:, self.size // 2 :: max(pixels.shape[1] // 7, 1)][:, :7]
            few.append(np.pad(some, ((0, 0), (0, 8 - some.shape[1]))))
        shown = np.array(examples, np.int64)
        sizes = np.ascontiguousarray(np.concatenate(few)).view(np.int64).ravel()

        def content(file: int) -> bytes:
            first = int(np.searchsorted(shown, shown[file]))
            return self[int(shown[file])].images[file - first].tobytes()

        return Pictures(shown, np.arange(len(shown)), sizes, content)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.entries else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": {}}  # a memory map is opened by each process

    def check(self, image_size: int, text: TextProcessor) -> None:
        """Raise ValueError naming the first option that these samples were not processed with."""
        for name, wanted in processing(image_size, text).items():
            if (had := self.manifest["processing"].get(name)) != wanted:
                what = (
                    "another tokenizer"
                    if name == "tokenizer"
                    else f"{name} {had!r} and not {wanted!r}"
                )
                raise ValueError(
                    f"{self.folder} was prepared with {what}: prepare the data again, or train with that"
                )

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, row = self.place(index)
        columns = self.shards.get(shard) or self.open(shard)
        try:
            values = {name: column(row) for name, column in columns.items()}
            if not self.checked[index]:
                if checksum(values) != values["crc32"]:
                    raise ValueError("its checksum differs")
                check_row(values, self.size, self.manifest["processing"]["image_tokens"])
                self.checked[index] = True
            turns = [(question, answer) for question, answer in json.loads(values["turns"])]
            images = values["images"].reshape(-1, 3, self.size, self.size)
            return Example(values["name"], images, turns, documents=documents_of(values, turns))
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            file = self.folder / self.entries[shard]["file"]
            wrong = f"{file} is damaged: row {row} is not what was written"
            raise DamagedShard(f"{wrong}. Delete the file and {AGAIN}") from error

    def place(self, index: int) -> tuple[int, int]:
        """(shard, row in it) of an example."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, int(index - (self.ends[shard - 1] if shard else 0))

    def open(self, shard: int) -> dict[str, Any]:
        """The columns of a shard as functions of the row, which return views of the file."""
        import pyarrow as pa

        file = self.folder / self.entries[shard]["file"]
        try:
            with pa.memory_map(
                str(file)
            ) as mapped:  # its buffers keep the map when the file is closed
                batch = pa.ipc.open_file(mapped).get_batch(0)
            batch.validate(full=True)
            if (
                not batch.schema.equals(columns_of_a_shard())
                or len(batch) != self.entries[shard]["samples"]
            ):
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
    """A function from row to value for an Arrow array: numbers and bytes as NumPy views, the rest as Python has it."""
    import pyarrow as pa

    if pa.types.is_large_binary(column.type):
        _, offsets, data = column.buffers()
        starts, values = np.frombuffer(offsets, np.int64), np.frombuffer(data, np.uint8)
    elif pa.types.is_list(column.type):
        starts, values = column.offsets.to_numpy(), column.values.to_numpy()
    else:
        return lambda row: column[row].as_py()
    return lambda row: values[starts[row] : starts[row + 1]]
