"""The held-out split of a run, by picture: no picture is on both sides, under whatever name.

Examples are often one question each, so a split by example would train on the pictures that it
scores. A checkpoint keeps what was held out (`Split.record`). A run that resumes takes it from
there and compares no pictures again.

The record is JSON:

    examples     number of examples of the whole data set
    fingerprint  of the whole data set, or null
    held_out     numbers of the held-out examples
    marks        [size, digest] of each held-out picture; [TEXT, digest] of an example without one
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
from nanovlm_fast.data.sources.streamed import StreamedRows
from nanovlm_fast.ranks import World
from nanovlm_fast.runs import RunState


@dataclass
class Split:
    """A source in two parts, and the record from which a checkpoint makes the same two again."""

    train: Source
    held_out: Source
    record: dict[str, Any]
    lines: list[str]  # for the log of the run
    rows: StreamedRows | None = None  # with --streaming; `train` is then its beginning alone


def split_off(source: Source, held_out: int, seed: int, data: str = "") -> tuple[Subset, Subset]:
    """(the rest, the examples of `held_out` random pictures), the latter at most half of all.

    An example without a picture counts as one and is held out alone. Raises ValueError if the
    source is empty.
    """
    check_not_empty(source, data)
    pictures = source.pictures() if held_out else None  # comparing them takes time
    return _cut(source, choose(source, held_out, seed, pictures)[0])


def check_not_empty(source: Source, data: str) -> None:
    """Raise ValueError, naming the file if there is one, for a data set without records."""
    if len(source) == 0:
        no_record = f": no record in {source.file}" if source.file else ""
        raise ValueError(f"--data {data}: the data set is empty{no_record}")


def choose(
    source: Source,
    wanted: int,
    seed: int,
    pictures: Pictures | None,
) -> tuple[list[int], int]:
    """(the examples to hold out, how many groups they are), where a group shares pictures.

    Where each example has pictures of its own, these are the first of a permutation: committed
    results rest on that draw.
    """
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    room = len(source) // 2  # a small data set must not be held out as a whole
    taken: list[int] = []
    seen: set[int] = set()
    groups = 0
    for example in order:
        if groups == wanted or len(taken) == room:
            break
        if example in seen:
            continue
        group = pictures.group(example) if pictures else {example}
        seen |= group
        # A group that does not fit is passed over, and a smaller one after it may fit
        if len(taken) + len(group) <= room:
            taken += group
            groups += 1
    return sorted(taken), groups


TEXT = -2  # in place of a picture's size; -1 there means that the picture cannot be read


def marks(source: Source, examples: list[int], pictures: Pictures | None) -> list[list[Any]]:
    """What identifies examples in data that has changed since, without repetitions.

    That is [size, digest] of each picture, and [TEXT, digest] of an example without one. Numbers of
    examples would not do: one line more at the top of a file shifts them all.
    """
    found: list[tuple[int, str]] = []
    for example in examples:
        files = pictures.of(example) if pictures else []
        if not pictures or not files:
            found.append((TEXT, text_digest(source, example, named=pictures is None)))
            continue
        found += [(int(pictures.sizes[file]), pictures.digest(file)) for file in files]
    return [list(mark) for mark in dict.fromkeys(found)]


def text_digest(source: Source, index: int, named: bool) -> str:
    """Equal for examples with the same turns and, if `named`, the same name; '' if unreadable.

    Names count for sources whose pictures are not compared: the turns alone may be the same for
    many examples, as with synthetic data.
    """
    try:
        example: Example = source[index]
    except ValueError:
        return ""
    return digest_of_text(example, example.name if named else "")


def digest_of_text(example: Example, name: str = "") -> str:
    return hashlib.sha256(f"{name} {example.turns}".encode(errors="replace")).hexdigest()[:32]


def find_again(source: Source, kept: list[list[Any]], pictures: Pictures | None) -> list[int]:
    """The examples of changed data with a picture, or a text, that was held out before."""
    # Without '': all unreadable examples would be the same one
    wanted = {(size, digest) for size, digest in kept if digest}
    sizes = {size for size, _ in wanted}
    found: set[int] = set()
    if pictures is not None:
        for size in sizes:
            for file in pictures.same_size(size):
                if (size, pictures.digest(file)) in wanted:
                    found |= pictures.showing(file)
    # All examples are read to compare texts, so only if some text was held out
    if TEXT in sizes:
        for index in range(len(source)):
            alone = not (pictures and pictures.of(index))
            if alone and (TEXT, text_digest(source, index, named=pictures is None)) in wanted:
                found.add(index)
    # New examples may connect what was held out with further pictures
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
    """The split of a run, the same on all ranks.

    `state` is that of the checkpoint which the run resumes from, or None. Raises ValueError if
    there is no data, if the ranks see different data, or if the data is not what the checkpoint was
    trained on, unless --data-changed accepts that.
    """
    check_not_empty(source, config.data)
    counts = {*world.gather(len(source))}
    if len(counts) > 1:
        found = " and ".join(f"{count:,}" for count in sorted(counts))
        differ = f"the processes see different data: {found} examples"
        raise ValueError(f"--data {config.data}: {differ}")
    # One rank compares pictures, which reads files; the others take its result. An error travels
    # the same way, so that all ranks raise it: one that stopped alone would leave them waiting
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
    """(the record of the split, lines for the log, an error message or '')."""
    now = {"fingerprint": source.fingerprint, "examples": len(source)}
    kept = (state or {}).get("data")
    if kept is None:
        record, lines = _chosen(source, config, now, resumed=state is not None)
        return record, [*lines, describe(record)], ""
    if wrong := misshapen(kept):
        return {}, [], f"--resume: the checkpoint's state.json is damaged: its data, {wrong}"
    changes = differences(kept, now)
    if not changes:
        return kept, [describe(kept)], ""
    if not config.data_changed:
        changed = f"--data {config.data} is not what the run was trained on: {changes}"
        return {}, [], f"{changed}. --data-changed goes on with it, --out begins a new run"
    pictures = source.pictures() if config.val_samples else None
    held_out = find_again(source, kept["marks"], pictures)
    record = {**now, "held_out": held_out, "marks": marks(source, held_out, pictures)}
    found = "what was held out stays so, as far as it is found again"
    return record, [f"--data-changed: {changes}; {found}", describe(record)], ""


def _chosen(
    source: Source, config: TrainConfig, now: dict[str, Any], resumed: bool
) -> tuple[dict[str, Any], list[str]]:
    """(record, lines for the log) where no checkpoint says what was held out."""
    lines = []
    pictures = source.pictures() if config.val_samples else None
    if resumed:
        held_out = first_drawn(source, config)
        lines.append("warning: the checkpoint does not say on what data: taken to be the same")
    else:
        held_out, groups = choose(source, config.val_samples, config.seed, pictures)
        if groups < config.val_samples:
            lines.append(fewer(config.val_samples, groups, len(source)))
    record = {**now, "held_out": held_out, "marks": marks(source, held_out, pictures)}
    return record, lines


def first_drawn(source: Source, config: TrainConfig) -> list[int]:
    """What runs held out whose checkpoints do not record it: examples, whatever they show.

    Another choice would now score the run on examples that it was trained on.
    """
    order = np.random.default_rng(config.seed).permutation(len(source))
    return sorted(order[: min(config.val_samples, len(source) // 2)].tolist())


def fewer(wanted: int, groups: int, count: int) -> str:
    """The line of the log about a --val-samples that the data set is too small for."""
    at_most = f"at most half of the {count:,} examples, and no picture on both sides"
    return f"--val-samples {wanted}: only {groups} can be held out ({at_most})"


def describe(record: dict[str, Any]) -> str:
    """The line of the log about the split."""
    count = record["examples"]
    held_out = len(record["held_out"])
    pictures = sum(size != TEXT for size, _ in record["marks"])
    shown = f"{pictures:,} pictures in " if pictures else ""
    return f"training on {count - held_out:,} of {count:,} examples, held out: {shown}{held_out:,}"


def differences(kept: dict[str, Any], found: dict[str, Any]) -> str:
    """How the data differs from what a checkpoint records, for a message; '' if it does not."""
    changes = []
    if kept["examples"] != found["examples"]:
        changes.append(f"{kept['examples']:,} examples became {found['examples']:,}")
    if kept["fingerprint"] != found["fingerprint"]:
        before, now = (str(data["fingerprint"])[:12] for data in (kept, found))
        changes.append(f"content {before} became {now}")
    return ", ".join(changes)


def misshapen(kept: Any) -> str | None:
    """What is wrong with a checkpoint's record, which anyone may have edited; None for nothing."""
    try:
        fingerprint = kept["fingerprint"]
        if not isinstance(kept["examples"], int) or not isinstance(fingerprint, (str, type(None))):
            return "examples or fingerprint"
        # Its numbers index the source. `type`, as isinstance would take true for an int
        if not all(type(i) is int and 0 <= i < kept["examples"] for i in kept["held_out"]):
            return "held_out"
        if not all(type(size) is int and type(digest) is str for size, digest in kept["marks"]):
            return "marks"
    except (KeyError, TypeError, ValueError) as error:
        return repr(error)
    return None


def begin_again(state: RunState, record: dict[str, Any]) -> None:
    """Put the record into the state and, if the data has changed, read it from its beginning.

    The positions of a run in the old data mean nothing in the new. How many examples it has seen
    still counts, so it becomes the position of all shards. A stream, whose record has no number of
    examples, is read from its first row, as its shards count what they have read of it.
    """
    kept = state.data
    state.data = record
    if kept is None or not differences(kept, record):
        return
    shards = len(state.stream)
    position = state.examples if record["examples"] else 0
    at = {"shards": shards, "position": position, "buffer": []}
    state.stream = [{"shard": i, **at} for i in range(shards)]
    state.bad = {}  # its keys are numbers of examples in the old data


def check_curriculum(source: Source, config: TrainConfig) -> None:
    """Raise ValueError if --curriculum selects no question: its share of the run would be empty.

    Reading ends at the first match, so only data without any is read to its end.
    """
    if not (config.curriculum and config.curriculum_share):
        return
    asked_of_each = 1 if config.turns == "first" else None
    for index in range(len(source)):
        try:
            turns = source.turns_of(index)[:asked_of_each]
        except ValueError:  # the stream names it
            continue
        if any(config.curriculum in question for question, _ in turns):
            return
    asked = f"--curriculum {printable(config.curriculum)!r}"
    nothing = f"no question of --data {config.data} contains it"
    raise ValueError(f"{asked}: {nothing}; --curriculum '' asks all questions from the start")
