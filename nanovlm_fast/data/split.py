"""Which examples are held out: all that show some pictures, so that none of these is trained on.

A checkpoint keeps what was held out (`Split.record`). A run that goes on takes that and compares no
pictures again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.same import Pictures
from nanovlm_fast.data.sources.example import Example, Source, Subset
from nanovlm_fast.ranks import World
from nanovlm_fast.runs import RunState


@dataclass
class Split:
    """A source in two parts, and what a checkpoint keeps to make the same two parts again."""

    train: Subset
    held_out: Subset
    record: dict[str, Any]
    lines: list[str]  # what a run says of it


def split_off(source: Source, held_out: int, seed: int, data: str = "") -> tuple[Subset, Subset]:
    """(the rest, the examples of `held_out` random pictures, but at most half of all examples).

    An example without a picture is held out alone. Raises ValueError if the source is empty.
    """
    check_not_empty(source, data)
    pictures = pictures_of(source) if held_out else None
    return _cut(source, choose(source, held_out, seed, pictures)[0])


def check_not_empty(source: Source, data: str) -> None:
    if len(source) == 0:
        where = getattr(source, "file", None)
        no_record = f": no record in {where}" if where else ""
        raise ValueError(f"--data {data}: the data set is empty{no_record}")


def pictures_of(source: Source) -> Pictures | None:
    """None for a source each of whose examples has pictures of its own."""
    return source.pictures() if hasattr(source, "pictures") else None


def choose(
    source: Source,
    wanted: int,
    seed: int,
    pictures: Pictures | None,
) -> tuple[list[int], int]:
    """(the examples to hold out, of how many pictures); the first drawn where each has its own."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    room, taken, seen, groups = len(source) // 2, [], set(), 0
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


def marks(source: Source, examples: list[int], pictures: Pictures | None) -> list[list[Any]]:
    """What finds examples again in changed data.

    That is [size, digest] of each picture, and [TEXT, digest] of an example without one.
    """
    found = []
    for example in examples:
        files = pictures.of(example) if pictures else []
        found += [[int(pictures.sizes[file]), pictures.digest(file)] for file in files]
        if not files:
            found.append([TEXT, text_digest(source, example, named=pictures is None)])
    return [list(mark) for mark in dict.fromkeys(map(tuple, found))]


def text_digest(source: Source, index: int, named: bool) -> str:
    """Equal for examples that say the same, and are `named` the same; '' for an unreadable one."""
    try:
        example: Example = source[index]
    except ValueError:
        return ""
    said = f"{example.name if named else ''} {example.turns}"
    return hashlib.sha256(said.encode(errors="replace")).hexdigest()[:32]


def find_again(source: Source, kept: list[list[Any]], pictures: Pictures | None) -> list[int]:
    """The examples of changed data that show a picture, or say a text, that was held out before."""
    wanted = {(size, digest) for size, digest in kept if digest}
    found: set[int] = set()
    for size in {size for size, _ in wanted} if pictures else ():
        for file in pictures.same_size(size):
            if (size, pictures.digest(file)) in wanted:
                found |= pictures.showing(file)
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
    source: Source,
    config: TrainConfig,
    world: World,
    state: dict[str, Any] | None,
) -> Split:
    """The split of a run, the same on all ranks; `state` is the checkpoint's that it goes on from.

    Raises ValueError if there is no data, if the ranks see different data, or if it is not what the
    checkpoint was trained on, unless --data-changed accepts that.
    """
    check_not_empty(source, config.data)
    if len(counts := {*world.gather(len(source))}) > 1:
        found = " and ".join(f"{count:,}" for count in sorted(counts))
        differ = f"the processes see different data: {found} examples"
        raise ValueError(f"--data {config.data}: {differ}")
    mine = _recorded(source, config, state) if world.first else None
    record, lines, error = world.gather(mine)[0]
    if error:
        raise ValueError(error)
    train, held_out = _cut(source, record["held_out"])
    if not len(train):
        all_held_out = "nothing is left to train on: all of it was held out before"
        raise ValueError(f"--data {config.data}: {all_held_out}")
    check_curriculum(train, config)
    return Split(train, held_out, record, lines)


def _recorded(
    source: Source, config: TrainConfig, state: dict[str, Any] | None
) -> tuple[dict[str, Any], list[str], str]:
    """(what a checkpoint keeps of the split, lines about it, an error or nothing)."""
    record = {"fingerprint": getattr(source, "fingerprint", None), "examples": len(source)}
    kept, lines = (state or {}).get("data"), []
    changes = ""
    if kept is not None:
        if wrong := _misshapen(kept):
            return {}, [], f"--resume: the checkpoint's state.json is damaged: its data, {wrong}"
        changes = differences(kept, record)
    if changes and not config.data_changed:
        changed = f"--data {config.data} is not what the run was trained on: {changes}"
        return {}, [], f"{changed}. --data-changed goes on with it, --out begins a new run"
    if kept is not None and not changes:
        record = kept
    else:
        pictures = pictures_of(source) if config.val_samples else None
        if changes:
            record["held_out"] = find_again(source, kept["marks"], pictures)
            found = "what was held out stays so, as far as it is found again"
            lines.append(f"--data-changed: {changes}; {found}")
        elif state is not None:
            record["held_out"] = first_drawn(source, config)
            lines.append("warning: the checkpoint does not say on what data: taken to be the same")
        else:
            record["held_out"], groups = choose(source, config.val_samples, config.seed, pictures)
            if groups < config.val_samples:
                lines.append(fewer(config.val_samples, groups, len(source)))
        record["marks"] = marks(source, record["held_out"], pictures)
    return record, [*lines, describe(record)], ""


def first_drawn(source: Source, config: TrainConfig) -> list[int]:
    """What was held out by runs whose checkpoints do not say it: examples, whatever they showed."""
    order = np.random.default_rng(config.seed).permutation(len(source))
    return sorted(order[: min(config.val_samples, len(source) // 2)].tolist())


def fewer(wanted: int, groups: int, count: int) -> str:
    at_most = f"at most half of the {count:,} examples, and no picture on both sides"
    return f"--val-samples {wanted}: only {groups} can be held out ({at_most})"


def describe(record: dict[str, Any]) -> str:
    """How many of what are held out."""
    count, held_out = record["examples"], len(record["held_out"])
    pictures = sum(size != TEXT for size, _ in record["marks"])
    shown = f"{pictures:,} pictures in " if pictures else ""
    return f"training on {count - held_out:,} of {count:,} examples, held out: {shown}{held_out:,}"


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


def begin_again(state: RunState, record: dict[str, Any]) -> None:
    """Keep the record in the state, and if the data has changed, begin to read it anew.

    The run's places in the old data mean nothing in the new; how many examples it has seen does.
    """
    kept = state.data
    state.data = record
    if kept is None or not differences(kept, record):
        return
    shards = len(state.stream)
    at = {"shards": shards, "position": state.examples, "buffer": []}
    state.stream = [{"shard": i, **at} for i in range(shards)]
    state.bad = {}  # by numbers that mean other examples now


def check_curriculum(source: Source, config: TrainConfig) -> None:
    """Raise ValueError if --curriculum asks no question: its share of the run would have no steps.

    Exact, and as good as free where something matches: reading ends at the first that does.
    """
    if not (config.curriculum and config.curriculum_share):
        return
    asked_of_each = 1 if config.turns == "first" else None
    for index in range(len(source)):
        try:
            turns = source[index].turns[:asked_of_each]
        except ValueError:
            continue
        if any(config.curriculum in question for question, _ in turns):
            return
    asked = f"--curriculum {printable(config.curriculum)!r}"
    nothing = f"no question of --data {config.data} contains it"
    raise ValueError(f"{asked}: {nothing}; --curriculum '' asks all questions from the start")
