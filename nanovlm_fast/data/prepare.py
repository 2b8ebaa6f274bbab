"""Decode, resize and tokenise a data set once, in parallel, into shards for train.py.

    python -m nanovlm_fast.data.prepare --preset nanovlm-222m --data OWNER/NAME --out DIR
    python train.py --preset nanovlm-222m --data prepared:DIR
    python -m nanovlm_fast.data.prepare --verify --out DIR

All options of train.py that decide what a sample holds are options here. If the command is killed,
the same command continues; on a finished folder it makes the shards that are missing or of the
wrong size. sources/shards.py describes the files. While the command runs there are also

    DIR/plan.json               the manifest to be, without the shards; replaced by manifest.json
    DIR/shard-00000.json ...    the manifest's entry of a finished shard
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nanovlm_fast.cli import parse_config
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.places import absolute_paths
from nanovlm_fast.data.samples import TooLong, chosen, make_sample, say_dropped
from nanovlm_fast.data.sources import shards
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer, streamable
from nanovlm_fast.data.sources.streamed import read_streaming
from nanovlm_fast.data.stream import LeftOut
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.data.workers import as_is, begin_worker
from nanovlm_fast.files import read_json
from nanovlm_fast.paths import at_home
from nanovlm_fast.ranges import Range
from nanovlm_fast.runs import is_empty, locked
from nanovlm_fast.threads import cores_of

# What a shard holds: numbers of examples, or the examples of a streamed source, where a ValueError
# stands for one that could not be read
Items = Iterable[int | Example | ValueError]
Task = tuple[int, Items]  # the number of a shard, and what it holds


# Images, or tiles of them, that a shard holds unless --shard-samples says how many examples it has
SHARD_IMAGES = 512
NAMED = 100  # examples of more images than --max-images that are named; the rest is counted


class ShardMaker(Dataset):
    """`maker[task]` writes a shard and returns its entry in the manifest.

    A data set, so that the workers of a data loader can run it: these end with their parent.
    """

    def __init__(
        self,
        source: Source | None,
        model: VLMConfig,
        train: TrainConfig,
        text: TextProcessor,
        folder: Path,
    ):
        self.source = source  # None for a streamed source, whose tasks hold the examples themselves
        self.model = model
        self.train = train
        self.tiled = bool(model.max_img_size)
        self.text = text
        self.folder = folder

    def __getitem__(self, task: Task) -> dict[str, Any]:
        number, items = task
        rows: list[dict[str, Any]] = []
        skipped: list[str] = []
        left = LeftOut()
        for item in items:
            try:
                rows.append(self.row(item, left))
            except ValueError as error:
                skipped.append(str(error))
        try:
            file = self.folder / f"shard-{number:05d}.arrow"
            entry = shards.write_shard(file, rows, self.tiled)
            entry |= {"number": number, "examples": len(rows) + len(skipped), "skipped": skipped}
            entry |= {"too_long": left.too_long, "dropped": dict(left.dropped)}
            # After the shard: a note stands for a whole shard, wherever the command is killed
            note = self.folder / f"shard-{number:05d}.json"
            shards.replace_file(note, lambda temporary: temporary.write_text(json.dumps(entry)))
            return entry
        except OSError as error:
            # Returned: raised, it would reach the parent as a traceback and not as one line
            return {"error": str(error)}

    def row(self, item: int | Example | ValueError, left: LeftOut) -> dict[str, Any]:
        """One example as a row of a shard; what the options leave out of it is noted in `left`.

        Raises ValueError if it cannot be read.
        """
        if isinstance(item, ValueError):
            raise item
        if not isinstance(item, Example):
            assert self.source is not None, "numbers of examples, and no source"
            item = self.source[item]
        try:
            example, dropped = chosen(item, self.train, self.text.mode)
            left.dropped.update(dropped)
            if dropped and not example.turns:
                left.dropped["examples"] += 1
        except TooLong as error:
            left.too_long.append(str(error))
            example = item.keep([])
        if not example.turns:
            # A row without a document, which training passes over: nothing here is unreadable
            example = replace(example, images=[])
        sample = make_sample(example, self.model, self.text)
        sample.documents = sample.documents if example.turns else []
        return shards.row_of(sample, example.turns, self.tiled)


def finished(folder: Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Entries of the finished shards, by number; removes what a killed process was writing.

    Raises ValueError if the folder holds other files, or what another command prepared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest first: a command killed at its very end leaves a plan beside it
    files = [folder / name for name in ("manifest.json", "plan.json")]
    noted = next((file for file in files if file.exists()), None)
    if noted is None:
        if not is_empty(folder):
            raise ValueError(f"{folder} holds other files: --out names another folder")
        return {}
    before = read_json(noted)
    check_plan(folder, before, plan)
    for leftover in folder.glob(".shard-*"):  # of a killed process; see `shards.replace_file`
        leftover.unlink()
    entries = before.get("shards") or [read_json(note) for note in folder.glob("shard-*.json")]
    try:
        for entry in entries:
            shards.check_entry(folder, entry)
        return {entry["number"]: entry for entry in entries if not shards.misfit(folder, entry)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{noted} is damaged: {error!r}; --out names another folder") from error


def check_plan(folder: Path, before: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise ValueError naming the first value in which a manifest or plan differs from `plan`.

    Shards made in two ways must not end up in one folder.
    """
    # Paths made absolute, as older versions stored them as they were given
    known = {**before, **before.get("processing", {}), **absolute_paths(before)}
    for name, value in {**plan, **plan["processing"]}.items():
        had = known.get(name)
        unknown = name == "fingerprint" and had is None  # of a version whose sources had none
        # "processing" itself is compared value by value, to name the one that differs
        if name != "processing" and had != value and not unknown:
            was = f"{folder} was prepared with {name} {had!r} and not {value!r}"
            raise ValueError(f"{was}: --out names another folder")


def tasks(examples: Items, per_shard: int, done: dict[int, Any]) -> Iterator[Task]:
    """The shards that are still to be made."""
    if isinstance(examples, range):
        for number, start in enumerate(range(0, len(examples), per_shard)):
            if number not in done:
                yield number, examples[start : start + per_shard]
        return
    # A streamed source is opened after the last shard of an unbroken row; see `prepare`
    number = first_missing(done)
    stream = iter(examples)
    while chunk := list(islice(stream, per_shard)):
        if number not in done:
            yield number, chunk
        number += 1


def first_missing(done: dict[int, Any]) -> int:
    """The smallest number of a shard that is not done."""
    return next(number for number in range(len(done) + 1) if number not in done)


def prepare(model: VLMConfig, train: TrainConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Make the missing shards of `args.out`, then its manifest, which is returned.

    Raises ValueError or OSError, in one line, if the data or the folder cannot be used, if more
    than --max-bad-samples examples cannot be read, or if the disk is full. Finished shards stay for
    the next attempt.
    """
    folder: Path = args.out
    source = None if args.streaming else load_source(train.data, args.split)
    if source is None and model.lm_tokenizer == "train":
        raise ValueError(
            "--streaming reads the data once: give a tokenizer that exists, with --lm-tokenizer"
        )
    tokenizer = make_tokenizer(model, source)
    text = make_text(tokenizer, model, train.turns)
    per_shard = args.shard_samples or max(1, SHARD_IMAGES // model.tiles_per_side**2)
    # All that decides what the shards hold: with another plan the folder is refused
    plan = {
        "format": shards.FORMAT,
        "data": train.data,
        "split": args.split,
        "fingerprint": None if source is None else source.fingerprint,
        "examples": None if source is None else len(source),
        "shard_samples": per_shard,
        "lm_tokenizer": model.lm_tokenizer,
        "processing": shards.processing(model, text, train),
    }
    done = finished(folder, plan)
    ready = sum(entry["examples"] for entry in done.values())
    if source is None:
        # What is skipped fills whole shards: each takes --shard-samples examples, bad ones included
        skip = first_missing(done) * per_shard
        kind, place = streamable(train.data)
        examples: Items = read_streaming(place, args.split, skip, kind)
    else:
        examples = range(len(source))
        check_disk(folder, len(source) - ready, model.vit_img_size)
    # After all that refuses: with a plan in it, the folder would refuse a command that asks for
    # something else, such as smaller images for a small disk
    if not (folder / "manifest.json").exists():
        note = json.dumps(plan, indent=2)
        shards.replace_file(folder / "plan.json", lambda file: file.write_text(note))
    tokenizer.save(folder)
    maker = ShardMaker(source, model, train, text, folder)
    made = DataLoader(
        maker,
        batch_size=None,
        sampler=tasks(examples, per_shard, done),
        num_workers=args.workers,
        collate_fn=as_is,
        worker_init_fn=begin_worker,
        # A task ahead may be a shard full of pictures, so no more than one per worker
        prefetch_factor=1 if args.workers else None,
    )
    write_shards(folder, made, done, train.max_bad_samples, total=plan["examples"], ready=ready)
    return write_manifest(folder, plan, [done[number] for number in sorted(done)])


def check_disk(folder: Path, examples: int, image_size: int) -> None:
    """Raise ValueError if the disk has no room for one image per example, a lower bound."""
    needed = examples * 3 * image_size**2
    free = shutil.disk_usage(folder).free
    if needed > free:
        taken = f"an image each takes {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} are free"
        raise ValueError(f"--out {folder}: {taken}")


def write_shards(
    folder: Path,
    made: Iterable[dict[str, Any]],
    done: dict[int, dict[str, Any]],
    max_bad_samples: int,
    total: Any,
    ready: int,
) -> None:
    """Add the entries of `made`, as its workers write the shards, to `done`.

    Raises OSError if one cannot be written, ValueError if over `max_bad_samples` are unreadable,
    those of earlier attempts included.
    """
    skipped = [reason for entry in done.values() for reason in entry["skipped"]]
    too_long = sum(len(entry.get("too_long", [])) for entry in done.values())
    with tqdm(total=total, initial=ready, unit="example", dynamic_ncols=True) as bar:
        for entry in made:
            if "error" in entry:
                raise OSError(f"--out {folder}: {entry['error']}")
            done[entry["number"]] = entry
            skipped += entry["skipped"]
            for reason in entry["skipped"]:
                bar.write(f"skipped, unreadable: {reason}")
            # As in training: many of them would fill the terminal
            for reason in entry["too_long"][: max(NAMED - too_long, 0)]:
                bar.write(f"skipped, too long: {reason}")
            too_long += len(entry["too_long"])
            bar.update(entry["examples"])
            if len(skipped) > max_bad_samples:
                over = f"are over --max-bad-samples {max_bad_samples}"
                raise ValueError(f"{len(skipped)} unreadable samples {over}")


def write_manifest(
    folder: Path, plan: dict[str, Any], entries: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the manifest, which makes the folder a finished one, and return it."""
    totals = {
        name: sum(entry[name] for entry in entries) for name in ("samples", "tokens", "bytes")
    }
    manifest = {
        **plan,
        **totals,
        "skipped": sum(len(entry["skipped"]) for entry in entries),
        # Absent from shards that an older version made
        "too_long": sum(len(entry.get("too_long", [])) for entry in entries),
        "dropped": dict(sum((Counter(entry.get("dropped")) for entry in entries), Counter())),
        "shards": entries,
    }
    shards.replace_file(
        folder / "manifest.json",
        lambda file: file.write_text(json.dumps(manifest, indent=2) + "\n"),
    )
    # Only now: killed before, the command finds its notes again
    for leftover in [folder / "plan.json", *folder.glob("shard-*.json")]:
        leftover.unlink(missing_ok=True)
    return manifest


def verify(folder: Path) -> None:
    """Compare every shard with its SHA-256. Raises DamagedShard, naming those that differ."""
    prepared = shards.Prepared(folder)
    wrong = [
        entry["file"]
        for entry in tqdm(prepared.entries, unit="shard", dynamic_ncols=True)
        if shards.sha256_of(folder / entry["file"]) != entry["sha256"]
    ]
    if wrong:
        raise shards.DamagedShard(
            f"{folder}: damaged: {', '.join(wrong)}. Delete them and {shards.AGAIN}"
        )


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m nanovlm_fast.data.prepare",
        description=(__doc__ or "").partition("\n")[0],
        epilog="All options of train.py are taken too: --preset, --data, --turns, --prompt, "
        "--lm-tokenizer ...",
        # An abbreviation here could be an option of train.py, which gets the rest of the line
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=at_home, required=True, help="folder of the shards")
    parser.add_argument(
        "--split", default="train", help="train or test; train.py looks for test in DIR/test"
    )
    parser.add_argument(
        "--workers",
        type=Range(int, most=1024),
        default=cores_of(),
        help="processes; 0: all in this one",
    )
    parser.add_argument(
        "--shard-samples",
        type=Range(int, least=1),
        help=f"examples per shard, which a worker holds in memory (default: {SHARD_IMAGES}, and "
        "fewer where images are cut into tiles)",
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="read a hub data set as it arrives, storing no copy",
    )
    parser.add_argument(
        "--verify", action="store_true", help="only compare the shards with their checksums"
    )
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args, rest = make_parser().parse_known_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.verify:
        verify(args.out)
        print(f"{args.out}: every shard is what was written")
        return 0
    try:
        with locked(args.out):
            manifest = prepare(*parse_config(rest), args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on from here") from None
    size = f"{manifest['bytes'] / 1e9:,.2f} GB"
    print(f"{manifest['samples']:,} samples, {manifest['tokens']:,} tokens, {size}")
    train_with = f"python train.py --data prepared:{args.out}"
    left = f"{manifest['skipped']} unreadable, {manifest['too_long']} too long"
    print(f"{left}{say_dropped(manifest['dropped'])} left out · train with: {train_with}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
