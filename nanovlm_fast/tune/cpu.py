"""Tunes a run on a CPU: the type of products, threads, how they wait, loader workers, compiling.

bfloat16 is tried on processors that multiply it by themselves. It rounds as autocast does on a GPU
(the section "Precision" of nanovlm_fast/model/README.md), so it needs no gate beyond compiling's.

OpenMP reads its environment once, when torch is loaded, so every candidate trains in a process of
its own (`cpu_process.py`), with the run's own data. The processes live side by side; one at a time
trains, for a moment, and the others sleep.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.threads import cores_of
from nanovlm_fast.tune.cache import Entry, Notebook
from nanovlm_fast.tune.candidates import Choice, cpu_candidates
from nanovlm_fast.tune.key import free_in
from nanovlm_fast.tune.launcher import Launcher
from nanovlm_fast.tune.measure import Comparison, Read, Reading, compare, least_pairs
from nanovlm_fast.tune.search import Fails, Limits, search

SERVE = "from nanovlm_fast.tune.cpu_process import serve; serve()"
READING_SECONDS = 0.4  # of training in one reading, in whole steps
ANSWER_SECONDS = 60.0
START_SECONDS = 180.0  # data, model, and compiling it
EPOCHS = 1e5  # the data must not end
MORE_PAIRS = 2  # than the fewest that can show anything


class CpuBench:
    """`search.Bench` for whole training steps, each choice in its own process."""

    def __init__(self, model: VLMConfig, config: TrainConfig, folder: Path, free: frozenset[str]):
        self.model = model
        self.config = config
        self.folder = folder
        self.free = free
        self.processes: dict[Choice, Launcher] = {}

    def __enter__(self) -> CpuBench:
        return self

    def __exit__(self, *_: object) -> None:
        self.keep(())

    def keep(self, choices: tuple[Choice, ...]) -> None:
        """End the processes of all other choices."""
        for choice in self.processes.keys() - set(choices):
            self.processes.pop(choice).close()

    def process_of(self, choice: Choice) -> Launcher:
        if choice not in self.processes:
            # What is the user's own is the environment's as it is.
            environment = choice.environment() if "waiting" in self.free else {}
            if choice.threads:
                environment["OMP_NUM_THREADS"] = str(choice.threads)
            config = self.config_of(choice)
            first = {"model": dataclasses.asdict(self.model), "train": dataclasses.asdict(config)}
            self.processes[choice] = Launcher(SERVE, first, environment, START_SECONDS)
        return self.processes[choice]

    def config_of(self, choice: Choice) -> TrainConfig:
        """The run by a choice: without end, and in a folder of its own."""
        changes: dict[str, Any] = {
            "out": str(self.folder / f"run-{len(list(self.folder.iterdir()))}"),
            "compile": choice.compile,
            "dtype": self.config.dtype if choice.dtype == "auto" else choice.dtype,
            "workers": choice.workers,
            "tune": "off",
            "curriculum": "",  # its first batches are nearly empty
            "epochs": EPOCHS,
            "max_steps": 0,
            "eval": "",
        }
        # About one command, and what has no place beside a clock.
        for name in ("resume", "overwrite", "auto_resume", "wandb"):
            changes[name] = False
        return dataclasses.replace(self.config, **changes)

    def ask(self, choice: Choice, question: dict[str, Any]) -> dict[str, Any]:
        """The answer of the process of a choice. Raises Fails if there is none."""
        answer, silent = self.process_of(choice).ask(question, ANSWER_SECONDS)
        if silent:
            raise Fails(silent)
        return answer

    def gate(self, choice: Choice, part: str) -> str | None:
        if choice.compile == "none":
            return None  # the rest changes where, when and in which type, and not what is computed
        try:
            return self.ask(choice, {"gate": choice.to_json()})["wrong"]
        except Fails as error:
            return str(error)

    def compare(self, base: Choice, choice: Choice, part: str, level: float) -> Comparison:
        self.keep((base, choice))
        pairs = least_pairs(level) + MORE_PAIRS
        return compare(self.reader(base), self.reader(choice), level, pairs)

    def reader(self, choice: Choice) -> Read:
        """Readings of the seconds that a full batch's tokens take."""

        def read() -> Reading:
            answer = self.ask(choice, {"seconds": READING_SECONDS})
            of_a_batch = self.config.tokens_per_batch / answer["tokens"]
            return Reading(answer["seconds"] * of_a_batch)

        return read

    def whole_seconds(self) -> float:
        return 0.0  # as long as any candidate

    def share(self, part: str, gain: float, base: float) -> float:
        return gain / base


def tune_cpu(
    model: VLMConfig,
    config: TrainConfig,
    key: dict[str, Any],
    plain: Choice,
    before: Entry | None = None,
) -> Entry:
    """Measure for about `config.tune_seconds`; the entry is in the cache when this returns.

    Raises ValueError if a run as it is does not train in a process of its own.
    """
    began = time.monotonic()
    free = free_in(key)
    cores = cores_of()
    workers = config.workers if config.workers >= 0 else 1
    # A number that the user has set stays the environment's.
    threads = cores if "threads" in free else 0
    plain = dataclasses.replace(plain, threads=threads, workers=workers)
    note = Notebook(key, plain, began)
    limits = Limits(time.monotonic, began + config.tune_seconds, note)
    with (
        tempfile.TemporaryDirectory() as folder,
        CpuBench(model, config, Path(folder), free) as bench,
    ):
        try:
            bench.ask(plain, {"seconds": READING_SECONDS})
        except Fails as error:
            raise ValueError(f"training fails in a process of its own: {error}") from error
        known = before.left_out() if before else None
        with note.interruptible():
            found = search(plain, cpu_candidates(free, cores), bench, limits, known)
    return Entry.of(key, plain, found, time.monotonic() - began)
