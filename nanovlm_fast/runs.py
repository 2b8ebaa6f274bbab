"""A run's folder: its lock, its configuration, its state, and the run that it replaces.

RUN/config.json        options of the run, as `save_run_config` writes them
RUN/.lock              held by the one command that may write here
RUN/.replacing         entries of the old run while --overwrite moves them, one by one
RUN/.replaced          the old run, complete, until the new one has a checkpoint
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovlm_fast.config import TrainConfig, VLMConfig, fields_of
from nanovlm_fast.files import read_json, write_whole
from nanovlm_fast.ranges import check_types

if TYPE_CHECKING:
    from nanovlm_fast.ranks import World

LOCK = ".lock"
REPLACED = ".replaced"
REPLACING = ".replacing"
OURS = (LOCK, REPLACED, REPLACING)
# What a start writes before the first step. A file that is still being written has a dot before
# its name.
BY_A_START = (
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "metrics.jsonl",
    "wandb",
    "checkpoints",
)
# What remains of a start that ended before the folder was a run.
LEFTOVERS = (".config.json", "hang-rank*.txt")
RUNS = Path("runs")


# ---- where a run stands
@dataclasses.dataclass
class RunState:
    """Where a run stands: the content of a checkpoint's `state.json`, from which a run resumes.

    Counts are of all ranks. `stream` holds this rank's shards while the run trains and those of all
    ranks in a file, so that a checkpoint does not depend on how many ranks wrote it.
    """

    step: int = 0  # optimizer steps taken, skipped ones included
    examples: int = 0  # positions of the data that were read, those left out included
    bad: dict[str, str] = dataclasses.field(default_factory=dict)  # unreadable: example -> reason
    too_long: int = 0  # times that an example did not fit the budget
    seconds: float = 0.0  # training time, without evaluations
    tokens: int = 0  # real tokens in the batches since the curriculum ended
    capacity: int = 0  # tokens that these batches had room for
    filled: dict[str, int] | None = None  # the same for images and labels, see `steps.FILLED`
    dropped: dict[str, int] | None = None  # by the run's options, see `samples.DROPPED`
    evaluated: int = 0  # the step that was evaluated last
    best_step: int | None = None
    best_accuracy: float = -1.0  # below any accuracy, so that the first evaluation is the best
    interval: dict[str, Any] | None = None  # losses since the last log line, from `StepStats`
    spikes: list[float] | None = None  # of the `SpikeDetector`
    loss_scale: dict[str, Any] | None = None  # in float16, from `LossScaler`
    micro_batches: int = 1  # per step, on all ranks; a resume with other ranks keeps the product
    stream: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # one state per shard
    data: dict[str, Any] | None = None  # which data, and what of it is held out
    eval: dict[str, Any] | None = None  # the last score of --eval
    # Keys of a newer version: written back unchanged, so that going back to it loses nothing.
    unknown: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """The state that `to_json` wrote. Raises ValueError naming the keys that are missing."""
        known = {field.name for field in dataclasses.fields(cls)} - {"unknown"}
        if missing := known - OPTIONAL - values.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}: of another version?")
        read = {name: value for name, value in values.items() if name in known}
        others = {name: value for name, value in values.items() if name not in known}
        return cls(**read, unknown=others)

    def to_json(self) -> dict[str, Any]:
        """What `state.json` holds. Lists and dicts are shared with the state, not copied."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        unknown = values.pop("unknown")
        absent = {name for name in OPTIONAL if values[name] is None}
        return {**{k: v for k, v in values.items() if k not in absent}, **unknown}


# Checkpoints of the first versions have no `data` and no `filled`; `eval` is there once --eval was
# scored, `dropped` once something was, and `loss_scale` once the run has computed in float16.
OPTIONAL = {"data", "eval", "filled", "dropped", "loss_scale"}


# ---- one command at a time
@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one process at a time may be in this block.

    The folder is created, and removed again if nothing was written into it. Raises OSError naming
    the process that holds the lock.

    The lock is a POSIX lock. The kernel releases it when its process ends, in whatever way, so it
    is never stale. Children do not inherit it, so that loader workers that outlive a killed parent
    do not hold it. Over NFS it holds between machines. A file system without locks gives a warning.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: --out names a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(folder / LOCK)
        try:
            yield
        finally:
            # The folder may be gone, or read-only by now.
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
            # After the file is gone: a process that waits for it must find it removed.
            os.close(handle)
    finally:
        # A folder that is not empty stays, and with it those above.
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def _take(file: Path) -> int:
    """Lock the file for this process; return its descriptor. Closing it releases the lock."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.pread(handle, 500, 0).decode(errors="replace").strip() or "another command"
            os.close(handle)
            in_use = f"{file.parent} is in use by {owner}"
            raise BlockingIOError(
                f"{in_use}: wait until it has ended, or let --out name another folder"
            ) from error
        except OSError as error:
            no_lock = f"{file.parent} cannot be locked ({error.strerror})"
            print(f"warning: {no_lock}: no other command may write there")
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                break
        # Its holder removed the file between the two calls, so this locks a file that nobody else
        # can open: try again.
        os.close(handle)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    os.truncate(handle, 0)
    owner = f"process {os.getpid()} on host {socket.gethostname()} since {now}\n"
    # The name is for the message only: on a full disk, the lock holds without it.
    with contextlib.suppress(OSError):
        os.pwrite(handle, owner.encode(), 0)
    return handle


@contextlib.contextmanager
def hold(run: Path, world: World) -> Iterator[None]:
    """`locked`, by the first rank for all; all ranks must call it.

    A replacement that was interrupted before the new run's first checkpoint is taken back.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if world.first:
            try:
                stack.enter_context(locked(run))
                restore(run)
            except OSError as error:
                refusal = str(error)
        # A refusal ends all ranks: one that went on alone would wait for the others for ever.
        refusal = world.gather(refusal)[0]
        if refusal:
            raise OSError(refusal)
        yield


# ---- what a folder holds
def has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*"))


def is_stub(run: Path) -> bool:
    """Whether the run in the folder ended before its first logged step: nothing to keep."""
    log = run / "metrics.jsonl"
    known = (*BY_A_START, *LEFTOVERS, *(f".{name}" for name in BY_A_START))
    if has_checkpoint(run) or (log.exists() and log.stat().st_size):
        return False
    return all(any(fnmatch(entry.name, name) for name in known) for entry in entries(run))


def is_empty(run: Path) -> bool:
    """Whether the folder is absent, or holds only what a start left that was killed early."""
    return not run.exists() or all(
        any(fnmatch(entry.name, name) for name in LEFTOVERS) for entry in entries(run)
    )


def entries(run: Path) -> list[Path]:
    """What is in the folder besides its lock and the run that it replaces."""
    return [entry for entry in run.iterdir() if entry.name not in OURS]


def standing(run: Path) -> Path:
    """Where the valid run is: in the folder, or aside until its successor has a checkpoint."""
    if (run / REPLACING / "config.json").exists():
        return run / REPLACING
    if (run / REPLACED / "config.json").exists() and not has_checkpoint(run):
        return run / REPLACED
    return run


# ---- from one run to the next
@contextlib.contextmanager
def beginning(run: Path, resume: bool, world: World) -> Iterator[None]:
    """Begin or resume a run in this block; if it fails, the folder is as it was before.

    The first rank moves a run that is replaced aside. `replaced` removes it later.
    """
    if not world.first:
        yield
        return
    config = run / "config.json"
    before = config.read_bytes() if resume else None
    run.mkdir(parents=True, exist_ok=True)
    if not (resume or is_empty(run)):
        if is_stub(run):
            _clear(run)
        else:
            _move_aside(run)
            kept = f"the run in it is kept in {run / REPLACED}"
            print(f"{run}: {kept} until the new one has a checkpoint")
    # From here on, all in the folder is the new run's.
    try:
        yield
    except BaseException:  # Ctrl-C too
        if before is None:
            aside = (run / REPLACED).exists()
            _put_back(run)
            if aside:  # or what was printed above would be the last that is heard of it
                print(f"{run}: the run that was to be replaced is back: the new one did not begin")
        else:
            config.write_bytes(before)
        raise


def replaced(run: Path) -> None:
    """Remove the run that was replaced, now that the new one has a checkpoint."""
    shutil.rmtree(run / REPLACED, ignore_errors=True)


def restore(run: Path) -> None:
    """Put back the run that a command moved aside and did not replace. The lock must be held."""
    if (run / REPLACED).exists() and has_checkpoint(run):
        replaced(run)
    elif (run / REPLACED).exists() or (run / REPLACING).exists():
        _put_back(run)
        print(f"{run}: the run that was to be replaced is back: the new one had no checkpoint yet")


def _move_aside(run: Path) -> None:
    """Move the run in the folder to RUN/.replaced.

    By way of RUN/.replacing, so that .replaced is complete whenever it exists, and a kill between
    two entries can be undone.
    """
    aside = run / REPLACING
    aside.mkdir()
    try:
        for entry in entries(run):
            os.replace(entry, aside / entry.name)
        os.replace(aside, run / REPLACED)
    except BaseException:
        _put_back(run)
        raise


def _put_back(run: Path) -> None:
    """Undo `_move_aside`, wherever it or this was interrupted."""
    aside = run / REPLACING
    # With .replacing, entries of the old run may lie beside it; without, all is the new run's.
    if not aside.exists():
        _clear(run)
        if (run / REPLACED).exists():
            os.replace(run / REPLACED, aside)
    if aside.exists():
        for entry in aside.iterdir():
            os.replace(entry, run / entry.name)
        aside.rmdir()


def _clear(run: Path) -> None:
    """Remove the run in the folder."""
    for entry in entries(run):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# ---- its configuration


def load_run_config(run: Path) -> dict[str, Any]:
    """Read what `save_run_config` wrote, as one flat dict of option names and values.

    Raises ValueError if it is damaged.
    """
    values = read_json(run / "config.json")
    try:
        for config_class in (VLMConfig, TrainConfig):
            check_types(config_class, fields_of(config_class, values))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{run / 'config.json'} is damaged: {error}") from error
    return {**fields_of(VLMConfig, values), **fields_of(TrainConfig, values)}


def tuned_in(run: Path) -> dict[str, Any]:
    """What a run's config.json notes of how it was tuned; empty if it notes nothing."""
    noted = read_json(run / "config.json").get("tuned")
    return noted if isinstance(noted, dict) else {}


def save_run_config(
    run: Path, model: VLMConfig, train: TrainConfig, tuned: dict[str, Any] | None = None
) -> None:
    """Write RUN/config.json; `tuned` is what a resume on the same device repeats."""
    values = {**dataclasses.asdict(model), **dataclasses.asdict(train)}
    # They are about one command: a resume must not overwrite because the first start did.
    once = ("resume", "data_changed", "auto_resume", "overwrite", "dry_run")
    values |= dict.fromkeys(once, False)
    if values["tune"] == "again":
        values["tune"] = "auto"
    if tuned is not None:
        values["tuned"] = tuned
    write_whole(run / "config.json", json.dumps(values, indent=2) + "\n")


def holds_run(folder: Path) -> bool:
    """Whether the folder is one that train.py wrote. (An exported model has a config.json too.)"""
    return (folder / "config.json").exists() and "preset" in load_run_config(folder)


def check_run_folder(run: Path, config: TrainConfig) -> None:
    """Raise ValueError unless `run` is new, empty, or a run that may be resumed or overwritten.

    A run that ended before its first logged step counts as nothing. Changes nothing.
    """
    if holds_run(run):
        if not (config.resume or config.overwrite or is_stub(run)):
            ways = "--resume continues it, --overwrite deletes it, --out names another"
            raise ValueError(f"{run} holds a run: {ways}")
    elif not is_empty(run):
        raise ValueError(f"{run} holds files that are no run: --out names another folder")


def latest_run(runs: Path = RUNS) -> Path:
    """The run folder under `runs` that was written to last.

    Raises FileNotFoundError if there is none.
    """
    found = [run for run in runs.glob("*") if (standing(run) / "config.json").exists()]
    if not found:
        raise FileNotFoundError(f"no run under {runs}/; train one with: python train.py")

    def written(run: Path) -> float:
        # The log and not the folder, whose time does not change when its files do.
        log = run / "metrics.jsonl"
        return (log if log.exists() else run).stat().st_mtime

    return max(found, key=written)
