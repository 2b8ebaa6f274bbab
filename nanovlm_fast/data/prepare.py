"""Decode, resize and tokenise a data set once, in parallel, into shards that train.py reads with no decoding.

    python -m nanovlm_fast.data.prepare --preset nanovlm-222m --data HuggingFaceM4/the_cauldron:ai2d --out DIR
    python train.py --preset nanovlm-222m --data prepared:DIR
    python -m nanovlm_fast.data.prepare --verify --out DIR

All options of train.py that decide what a sample holds are options here. Killed at any moment, the same command goes
on where it stopped; on a finished folder it makes what is missing or has not its size. shards.py says what is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nanovlm_fast.cli import parse_config
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.samples import make_sample
from nanovlm_fast.data.sources import shards
from nanovlm_fast.data.sources.cauldron import read_streaming
from nanovlm_fast.data.sources.example import Example, Source
from nanovlm_fast.data.sources.registry import load_source, make_tokenizer
from nanovlm_fast.data.text import TextProcessor
from nanovlm_fast.data.workers import begin_worker
from nanovlm_fast.files import read_json
from nanovlm_fast.paths import absolute_paths, at_home
from nanovlm_fast.ranges import Range
from nanovlm_fast.runs import is_empty, locked

Task = tuple[
    int, Iterable[int | Example | ValueError]
]  # a shard's number, and its examples or where they are


class ShardMaker(Dataset):
    """`maker[task]` writes a shard and returns its entry. In a data loader's workers, which end with their parent."""

    def __init__(self, source: Source | None, image_size: int, text: TextProcessor, folder: Path):
        self.source, self.image_size, self.text, self.folder = source, image_size, text, folder

    def __getitem__(self, task: Task) -> dict[str, Any]:
        number, items = task
        rows, skipped = [], []
        for item in items:
            try:
                if isinstance(item, ValueError):
                    raise item
                example = item if isinstance(item, Example) else self.source[item]
                example = example.first() if self.text.mode == "first" else example
                rows.append(
                    shards.row_of(make_sample(example, self.image_size, self.text), example.turns)
                )
            except ValueError as error:
                skipped.append(str(error))
        try:
            entry = shards.write_shard(self.folder / f"shard-{number:05d}.arrow", rows)
            entry |= {"number": number, "examples": len(rows) + len(skipped), "skipped": skipped}
            note = self.folder / f"shard-{number:05d}.json"  # says that the shard is whole
            shards.replace_file(note, lambda temporary: temporary.write_text(json.dumps(entry)))
            return entry
        except OSError as error:
            return {"error": str(error)}


def finished(folder: Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Entries of the shards that are there and whole, by number; makes the folder ready for the rest.

    Raises ValueError if the folder holds something else, or what another command prepared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noted = next(
        (folder / name for name in ("manifest.json", "plan.json") if (folder / name).exists()), None
    )
    if noted is None:
        if not is_empty(folder):
            raise ValueError(f"{folder} holds other files: --out names another folder")
        shards.replace_file(
            folder / "plan.json", lambda file: file.write_text(json.dumps(plan, indent=2))
        )
        return {}
    before = read_json(noted)
    for name, value in {**plan, **plan["processing"]}.items():
        had = {**before, **before.get("processing", {}), **absolute_paths(before)}.get(name)
        unknown = name == "fingerprint" and had is None  # of a version whose sources had none
        if name != "processing" and had != value and not unknown:
            raise ValueError(
                f"{folder} was prepared with {name} {had!r} and not {value!r}: --out names another folder"
            )
    for leftover in folder.glob(".shard-*"):
        leftover.unlink()
    entries = before.get("shards") or [read_json(note) for note in folder.glob("shard-*.json")]
    try:
        for entry in entries:
            shards.check_entry(folder, entry)
        return {entry["number"]: entry for entry in entries if not shards.misfit(folder, entry)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{noted} is damaged: {error!r}; --out names another folder") from error


def tasks(
    examples: Iterable[int | Example | ValueError] | range, per_shard: int, done: dict[int, Any]
) -> Iterator[Task]:
    """The shards that are still to make."""
    if isinstance(examples, range):
        for number, start in enumerate(range(0, len(examples), per_shard)):
            if number not in done:
                yield number, examples[start : start + per_shard]
        return
    number = first_missing(done)  # what comes before was not read
    examples = iter(examples)
    while chunk := list(islice(examples, per_shard)):
        if number not in done:
            yield number, chunk
        number += 1


def first_missing(done: dict[int, Any]) -> int:
    return next(number for number in range(len(done) + 1) if number not in done)


def prepare(model: VLMConfig, train: TrainConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Make the missing shards of `args.out`, then its manifest, which is returned.

    Raises ValueError or OSError, in one line, if the data or the folder will not do, if over --max-bad-samples examples
    cannot be read, or if the disk is full. Whole shards stay for the next try.
    """
    folder, per_shard = args.out, args.shard_samples
    source = None if args.streaming else load_source(train.data, args.split)
    if source is None and model.lm_tokenizer == "train":
        raise ValueError(
            "--streaming reads the data once: give a tokenizer that exists, with --lm-tokenizer"
        )
    tokenizer = make_tokenizer(model, source)
    text = TextProcessor(tokenizer, model.prompt, model.image_tokens, train.turns)
    plan = {
        "format": shards.FORMAT,
        "data": train.data,
        "split": args.split,
        "fingerprint": getattr(source, "fingerprint", None),
        "examples": None if source is None else len(source),
        "shard_samples": per_shard,
        "lm_tokenizer": model.lm_tokenizer,
        "processing": shards.processing(model.vit_img_size, text),
    }
    done = finished(folder, plan)
    tokenizer.save(folder)
    ready = sum(entry["examples"] for entry in done.values())
    if source is None:
        examples: Any = read_streaming(train.data, args.split, skip=first_missing(done) * per_shard)
    else:
        examples = range(len(source))
        needed, free = (
            (len(source) - ready) * 3 * model.vit_img_size**2,
            shutil.disk_usage(folder).free,
        )
        if needed > free:
            raise ValueError(
                f"--out {folder}: an image each takes {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} are free"
            )
    maker = ShardMaker(source, model.vit_img_size, text, folder)
    made = DataLoader(
        maker,
        batch_size=None,
        sampler=tasks(examples, per_shard, done),
        num_workers=args.workers,
        collate_fn=_as_it_is,
        worker_init_fn=begin_worker,
        prefetch_factor=1 if args.workers else None,
    )
    skipped = [reason for entry in done.values() for reason in entry["skipped"]]
    with tqdm(total=plan["examples"], initial=ready, unit="example", dynamic_ncols=True) as bar:
        for entry in made:
            if "error" in entry:
                raise OSError(f"--out {folder}: {entry['error']}")
            done[entry["number"]] = entry
            skipped += entry["skipped"]
            for reason in entry["skipped"]:
                bar.write(f"skipped, unreadable: {reason}")
            bar.update(entry["examples"])
            if len(skipped) > train.max_bad_samples:
                raise ValueError(
                    f"{len(skipped)} unreadable samples are over --max-bad-samples {train.max_bad_samples}"
                )
    return write_manifest(folder, plan, [done[number] for number in sorted(done)])


def write_manifest(
    folder: Path, plan: dict[str, Any], entries: list[dict[str, Any]]
) -> dict[str, Any]:
    totals = {
        name: sum(entry[name] for entry in entries) for name in ("samples", "tokens", "bytes")
    }
    manifest = {
        **plan,
        **totals,
        "skipped": sum(len(entry["skipped"]) for entry in entries),
        "shards": entries,
    }
    shards.replace_file(
        folder / "manifest.json",
        lambda file: file.write_text(json.dumps(manifest, indent=2) + "\n"),
    )
    for leftover in [folder / "plan.json", *folder.glob("shard-*.json")]:
        leftover.unlink(missing_ok=True)
    return manifest


def verify(folder: Path) -> None:
    """Compare every shard with its SHA-256. Raises DamagedShard naming those that differ."""
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


def _as_it_is(entry: dict[str, Any]) -> dict[str, Any]:
    return entry


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m nanovlm_fast.data.prepare",
        description=__doc__.splitlines()[0],
        epilog="Further options are train.py's: --preset, --data, --turns, --prompt, --lm-tokenizer ...",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=at_home, required=True, help="folder of the shards")
    parser.add_argument(
        "--split", default="train", help="train or test; test split: --out DIR/test"
    )
    parser.add_argument(
        "--workers",
        type=Range(int, most=1024),
        default=len(os.sched_getaffinity(0)),
        help="processes; 0: in this one",
    )
    parser.add_argument(
        "--shard-samples", type=Range(int, least=1), default=512, help="examples in a shard"
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
    print(
        f"{manifest['samples']:,} samples, {manifest['tokens']:,} tokens, {manifest['bytes'] / 1e9:,.2f} GB"
    )
    print(
        f"{manifest['skipped']} unreadable left out · train with: python train.py --data prepared:{args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
