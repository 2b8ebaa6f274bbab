"""Which examples are held out: pictures and not examples, so that no held-out picture is trained on.

A checkpoint keeps what was held out (`Split.record`). A run that goes on takes that and asks no picture again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.same import Pictures
from nanovlm_fast.data.sources import Example, Source, Subset
from nanovlm_fast.distributed import World


@dataclass
class Split:
    """A source in two parts, and what a checkpoint keeps to make the same two parts again."""

    train: Subset
    held_out: Subset
    record: dict[str, Any]
    lines: list[str]  # what a run says of it


def split_off(source: Source, held_out: int, seed: int, data: str = "") -> tuple[Subset, Subset]:
    """(the rest, `held_out` random pictures with all their examples, but at most half of the examples).

    An example without a picture is held out alone. Raises ValueError if the source is empty.
    """
    check_not_empty(source, data)
    return _cut(source, choose(source, held_out, seed)[0])


def check_not_empty(source: Source, data: str) -> None:
    if len(source) == 0:
        where = getattr(source, "file", None)
        no_record = f": no record in {where}" if where else ""
        raise ValueError(f"--data {data}: the data set is empty{no_record}")


def pictures_of(source: Source) -> Pictures | None:
    """None for a source each of whose examples has pictures of its own."""
    return source.pictures() if hasattr(source, "pictures") else None


def choose(source: Source, wanted: int, seed: int) -> tuple[list[int], int]:
    """(the examples to hold out, how many pictures these are); the first drawn where all have their own."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    room, taken, seen, groups = len(source) // 2, [], set(), 0
    pictures = pictures_of(source) if wanted and room else None
    for example in order:
        if groups == wanted or len(taken) == room:
            break
        if example in seen:
            continue
        group = pictures.group(example) if pictures else {example}
        seen |= group
        if len(taken) + len(group) <= room:
            taken += group
            groups += 1
    return sorted(taken), groups


TEXT = -2  # instead of a picture's size


def marks(source: Source, examples: list[int]) -> list[list[Any]]:
    """What finds examples again in changed data: [size, digest] of each picture, or [TEXT, digest] of one without."""
    pictures = pictures_of(source) if examples else None
    found = []
    for example in examples:
        files = pictures.of(example) if pictures else []
        found += [[int(pictures.sizes[file]), pictures.digest(file)] for file in files]
        if not files:
            found.append([TEXT, text_digest(source, example, named=pictures is None)])
    return [list(mark) for mark in dict.fromkeys(map(tuple, found))]


def text_digest(source: Source, index: int, named: bool) -> str:
    """Equal for examples that say the same (and are `named` the same); one that cannot be read has none."""
    try:
        example: Example = source[index]
    except ValueError:
        return ""
    said = f"{example.name if named else ''} {example.turns}"
    return hashlib.sha256(said.encode(errors="replace")).hexdigest()[:32]


def find_again(source: Source, kept: list[list[Any]]) -> list[int]:
    """The examples of changed data that show a picture, or say a text, that was held out before."""
    wanted = {(size, digest) for size, digest in kept if digest}
    pictures, found = pictures_of(source), set()
    for size in {size for size, _ in wanted} if pictures else ():
        alike = [
            file for file in pictures.same_size(size) if (size, pictures.digest(file)) in wanted
        ]
        found |= {example for file in alike for example in pictures.showing(file)}
    for index in range(len(source)) if any(size == TEXT for size, _ in wanted) else ():
        alone = not (pictures and pictures.of(index))
        if alone and (TEXT, text_digest(source, index, named=pictures is None)) in wanted:
            found.add(index)
    groups = [pictures.group(example) for example in found] if pictures else []
    return sorted(found.union(*groups))


def _cut(source: Source, held_out: list[int]) -> tuple[Subset, Subset]:
    kept = np.array(held_out, np.int64)
    return Subset(source, np.setdiff1d(np.arange(len(source)), kept)), Subset(source, kept)


def split_run(
    source: Source, config: TrainConfig, world: World, state: dict[str, Any] | None
) -> Split:
    """The split of a run, the same on all ranks; `state` is that of the checkpoint which it goes on from.

    Raises ValueError if there is no data, if the ranks see different data, or if it is not what the checkpoint was
    trained on, unless --data-changed accepts that.
    """
    check_not_empty(source, config.data)
    if len(counts := {*world.gather(len(source))}) > 1:
        found = " and ".join(f"{count:,}" for count in sorted(counts))
        raise ValueError(
            f"--data {config.data}: the processes see different data: {found} examples"
        )
    record, lines, error = world.gather(_recorded(source, config, state) if world.first else None)[
        0
    ]
    if error:
        raise ValueError(error)
    train, held_out = _cut(source, record["held_out"])
    if not len(train):
        raise ValueError(
            f"--data {config.data}: nothing is left to train on: all of it was held out before"
        )
    check_curriculum(train, config)
    return Split(train, held_out, record, lines)


def _recorded(
    source: Source, config: TrainConfig, state: dict[str, Any] | None
) -> tuple[dict[str, Any], list[str], str]:
    """(what a checkpoint keeps of the split, lines about it, an error or nothing)."""
    count, wanted, lines = len(source), config.val_samples, []
    record = {"fingerprint": getattr(source, "fingerprint", None), "examples": count}
    kept = (state or {}).get("data")
    if state is None:
        record["held_out"], groups = choose(source, wanted, config.seed)
        if groups < wanted:
            at_most = f"at most half of the {count:,} examples, and no picture on both sides"
            lines.append(f"--val-samples {wanted}: only {groups} can be held out ({at_most})")
    elif kept is None:  # of a version that kept nothing, and held out examples whatever they showed
        order = np.random.default_rng(config.seed).permutation(count)
        record["held_out"] = sorted(order[: min(wanted, count // 2)].tolist())
        lines.append(
            "warning: this checkpoint does not say what data it was trained on: taken to be the same"
        )
    elif wrong := _misshapen(kept):
        return {}, [], f"--resume: state.json of the checkpoint is damaged: its data, {wrong}"
    elif not (changes := differences(kept, record)):
        record = kept
    elif config.data_changed:
        record["held_out"] = find_again(source, kept["marks"])
        lines.append(
            f"--data-changed: {changes}; what was held out stays so, as far as it is found again"
        )
    else:
        changed = f"--data {config.data} is not what the run was trained on: {changes}"
        return {}, [], f"{changed}. --data-changed goes on with it, --out begins a new run"
    record.setdefault("marks", marks(source, record["held_out"]))
    pictures = sum(size != TEXT for size, _ in record["marks"])
    shown = f"{pictures:,} pictures in " if pictures else ""
    held = f"held out: {shown}{len(record['held_out']):,}"
    lines.append(f"training on {count - len(record['held_out']):,} of {count:,} examples, {held}")
    return record, lines, ""


def differences(kept: dict[str, Any], found: dict[str, Any]) -> str:
    """What of the data is not as a checkpoint has it, for people; nothing where it is the same."""
    changes = []
    if kept["examples"] != found["examples"]:
        changes.append(f"{kept['examples']:,} examples became {found['examples']:,}")
    if kept["fingerprint"] != found["fingerprint"]:
        before, now = (str(data["fingerprint"])[:12] for data in (kept, found))
        changes.append(f"content {before} became {now}")
    return ", ".join(changes)


def _misshapen(kept: Any) -> str | None:
    """What of a checkpoint's record is not as `_recorded` makes it."""
    try:
        kinds = (kept["examples"], int), (kept["fingerprint"], (str, type(None)))
        if not all(isinstance(value, kind) for value, kind in kinds):
            return "examples or fingerprint"
        if not all(type(i) is int and 0 <= i < kept["examples"] for i in kept["held_out"]):
            return "held_out"
        if not all(type(size) is int and type(digest) is str for size, digest in kept["marks"]):
            return "marks"
    except (KeyError, TypeError, ValueError) as error:
        return repr(error)
    return None


def begin_again(state: dict[str, Any], record: dict[str, Any]) -> None:
    """If the data has changed: the run's places in it are worth nothing, only how many examples it has seen is."""
    kept = state.get("data")
    state["data"] = record
    if kept is None or not differences(kept, record):
        return
    shards = len(state["stream"])
    at = {"shards": shards, "position": state["examples"], "buffer": []}
    state["stream"] = [{"shard": i, **at} for i in range(shards)]
    state["bad"] = {}  # by numbers that mean other examples now


def check_curriculum(source: Source, config: TrainConfig) -> None:
    """Raise ValueError if no question is one that --curriculum asks: its share of the run would have no steps.

    Exact, and as good as free where something matches: reading ends at the first that does.
    """
    if not (config.curriculum and config.curriculum_share):
        return
    for index in range(len(source)):
        try:
            turns = source[index].turns
        except ValueError:
            continue
        if any(
            config.curriculum in question
            for question, _ in turns[: 1 if config.turns == "first" else None]
        ):
            return
    asked = f"--curriculum {printable(config.curriculum)!r}: no question of --data {config.data} contains it"
    raise ValueError(f"{asked}; --curriculum '' asks all questions from the start")
