"""Tunes a model for this device: candidates, gate, timing and search put together."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from nanovlm_fast.command import one_line, ran_out_of_memory
from nanovlm_fast.model.attention import (
    BACKENDS,
    PADDED,
    VISION_BACKENDS,
    choose_attention,
    choose_vision_attention,
)
from nanovlm_fast.model.lora import WITHOUT_ADAPTERS
from nanovlm_fast.ranks import end_with_parent
from nanovlm_fast.tune import cache
from nanovlm_fast.tune.cache import Entry, Notebook
from nanovlm_fast.tune.candidates import (
    INDUCTOR_SECONDS,
    Candidate,
    Choice,
    gpu_candidates,
    seen_by,
)
from nanovlm_fast.tune.key import free_in
from nanovlm_fast.tune.launcher import Launcher
from nanovlm_fast.tune.measure import PAIRS, Comparison, Read, Unsettled, compare
from nanovlm_fast.tune.parts import LAUNCHES, UPDATE, Job, Parts
from nanovlm_fast.tune.search import TOGETHER, WHOLE, Fails, Limits, search
from nanovlm_fast.tune.timing import reader

SERVE = "from nanovlm_fast.tune.gate import serve; serve()"
TUNE = "from nanovlm_fast.tune.tuner import serve; serve()"
OVERTIME = 600.0  # what the last candidate and the whole step may take once the time is spent
GATE_SECONDS = 60.0  # for one candidate: it compiles, and runs a dozen times
PLAIN_READINGS = 5
# Of the time, at most so much is kept for the last comparison, plain against chosen in the whole
# step: it is what shows that the choice pays. Where that takes more, candidates get all of it.
KEPT = 0.5
# What the time of a step is put together from. The update, a few percent, is timed only when its
# kernel is: it takes seconds to make all the weights.
STEP = ("vision", "language", "ends")
# As training runs them: with the host's launches.
UNCAPTURED = (LAUNCHES, UPDATE, WHOLE)


class DeviceLost(Exception):
    """What was timed made the device useless for this process, as an illegal access does."""


def check_device(device: torch.device) -> None:
    """Raise what is wrong with the device for as long as this process lives, if anything is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DeviceBench:
    """`search.Bench` on the device of a job. `pairs` are those of a comparison."""

    def __init__(self, job: Job, launcher: Launcher, pairs: int):
        self.job = job
        self.parts = Parts(job)
        self.launcher = launcher
        self.pairs = pairs
        self.plain: dict[str, float] = {}  # seconds of plain PyTorch in the parts of the step
        # Part -> the choice that others are compared with there, compiled once.
        self.bases: dict[str, tuple[Choice, Read]] = {}
        self.preparing = 0.0  # seconds of compiling plain PyTorch in the parts of the step

    def gate(self, choice: Choice, part: str) -> str | None:
        # Some options of the compiler take minutes, which is no hang.
        limit = max([GATE_SECONDS, *(INDUCTOR_SECONDS.get(name, 0.0) for name in choice.inductor)])
        question = {"choice": choice.to_json(), "part": part}
        answer, silent = self.launcher.ask(question, limit)
        return silent or answer["wrong"]

    def time_plain(self, plain: Choice) -> None:
        """Time the parts of the step, which are what a gain is a share of."""
        for part in STEP:
            began = time.monotonic()
            read = self.base_in(part, plain)
            self.preparing += time.monotonic() - began
            self.plain[part] = statistics.median(read().seconds for _ in range(PLAIN_READINGS))

    def compare(self, base: Choice, choice: Choice, part: str, level: float) -> Comparison:
        if part == WHOLE:  # two models and their optimizers need the memory
            self.bases.clear()
        try:
            first = self.base_in(part, base)
            second = self.read_of(part, choice)
            compared = compare(first, second, level, self.pairs)
        except Unsettled:
            raise
        except Exception as error:  # whatever CUDA, Triton or the compiler raises
            if part == WHOLE and ran_out_of_memory(error):
                raise Unsettled("the memory does not hold both at once") from error
            why = f"{type(error).__name__}: {one_line(error)[:300]}"
            try:
                check_device(self.parts.device)
            except Exception:
                # All further candidates would fail, and be left out for nothing.
                raise DeviceLost(why) from error
            raise Fails(why) from error
        # Whether it is taken is not decided here: if not, the base is compiled again.
        if compared.faster:
            self.bases[part] = (seen_by(part, choice), second)
        return compared

    def base_in(self, part: str, choice: Choice) -> Read:
        """What takes a reading of the base in a part, without compiling it again."""
        choice = seen_by(part, choice)
        kept = self.bases.get(part)
        if kept is None or kept[0] != choice:
            self.bases.pop(part, None)  # its memory first
            self.bases[part] = (choice, self.read_of(part, choice))
        return self.bases[part][1]

    def read_of(self, part: str, choice: Choice) -> Read:
        """Compile a part, and return what takes a reading of it."""
        choice = seen_by(part, choice)
        captured = part not in UNCAPTURED
        graphs = choice.compile == "reduce-overhead"
        # Two recordings cannot lie in each other, and one holds what the other would.
        mode = "default" if graphs and captured else choice.compile
        return reader(self.call_of(part, choice, mode), self.parts.device, captured)

    def call_of(self, part: str, choice: Choice, mode: str) -> Callable[[], object]:
        if part == UPDATE:
            return self.parts.update(choice)
        call = self.parts.call(part, choice, mode=mode)
        if part != WHOLE:
            return call
        update = self.parts.update(choice)
        return lambda: (call(), update())

    def share(self, part: str, gain: float, base: float) -> float:
        if part in STEP:
            return gain * self.scale(part) / self.step_seconds()
        if part == UPDATE:
            return gain / (self.step_seconds() + base)
        return gain / base  # a step as it is, if a shallow one

    def scale(self, part: str) -> float:
        """How many times a part is in the step."""
        vision, language = self.job.layers(part)
        blocks = {
            "vision": self.job.model.vit_n_blocks / vision,
            "language": self.job.model.lm_n_blocks / language,
        }
        return blocks.get(part, 1.0)

    def step_seconds(self) -> float:
        """Forward and backward of a step in plain PyTorch, put together from the parts."""
        return sum(self.plain[part] * self.scale(part) for part in STEP)

    def whole_seconds(self) -> float:
        # The deeper step has the same kernels more often: with 10 times the blocks, it takes about
        # 3 times as long to compile (bench/NOTES.md, "an H100").
        blocks = sum(self.job.layers(WHOLE)) / sum(self.job.layers("blocks"))
        return 2 * (self.preparing * blocks**0.5 + self.pairs * self.step_seconds())


def backends_for(job: Job) -> dict[str, list[str]]:
    """The attention backends that run here, beside those that `auto` takes, by their option."""
    where = torch.device(job.device), job.type
    found: dict[str, list[str]] = {}
    for option, names, choose in (
        ("attention", BACKENDS, choose_attention),
        ("vision_attention", VISION_BACKENDS, choose_vision_attention),
    ):
        # Padding each document is what the others were written to spare.
        known = (*PADDED, choose("auto", *where)[0])
        found[option] = []
        for name in names:
            with contextlib.suppress(ValueError):
                if name not in known:
                    found[option].append(choose(name, *where)[0])
    return found


def fit(candidates: list[Candidate], key: dict[str, Any]) -> list[Candidate]:
    """Return the candidates that can compute what the key describes."""
    if key["sharded"]:  # the update of shards is PyTorch's
        candidates = [candidate for candidate in candidates if candidate.part != UPDATE]
    if key.get("lora_rank"):
        candidates = [one for one in candidates if one.kernel not in WITHOUT_ADAPTERS]
    return candidates


def tune(
    job: Job,
    key: dict[str, Any],
    plain: Choice,
    seconds: float,
    failed: dict[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> Entry:
    """Measure for at most about `seconds`; the entry is in the cache when this returns.

    `failed` names candidates that are left out, and why. Raises ValueError if plain PyTorch itself
    does not run in a process of its own, and DeviceLost, after which this process is to end.
    """
    began = time.monotonic()
    free = free_in(key)
    if key["several_processes"]:
        free -= {"compile"}  # CUDA graphs are for one process
    candidates = fit(gpu_candidates(free, plain.compile != "none", backends_for(job)), key)
    note = Notebook(key, plain, began, say)
    with Launcher(SERVE, job.to_json()) as launcher:
        bench = DeviceBench(job, launcher, PAIRS)
        try:
            # Whatever is wrong with plain is wrong with the process, and no candidate's fault.
            if wrong := bench.gate(plain, "ends"):
                raise ValueError(f"plain PyTorch fails in a process of its own: {wrong}")
            bench.time_plain(plain)
            limits = Limits(time.monotonic, began + seconds, note, kept=KEPT * seconds)
            with note.interruptible():
                found = search(plain, candidates, bench, limits, failed)
        except DeviceLost:  # then nothing can be freed
            raise
        except BaseException:
            forget(bench)
            raise
        forget(bench)
    return Entry.of(key, plain, found, time.monotonic() - began)


def tune_apart(
    job: Job, key: dict[str, Any], plain: Choice, seconds: float, before: Entry | None = None
) -> Entry:
    """`tune` in a process of its own, so that a run starts with a device that nothing has broken.

    The gate runs a candidate only a few times, and not in a CUDA graph: what passes may still hang
    or die while it is timed. It is left out then, and the others are measured in a new process.
    `before` is what an earlier measurement for this key knows of candidates that fail. Raises
    ValueError if measuring fails.
    """
    began = time.monotonic()
    failed = before.left_out() if before else {}
    while True:
        left = seconds - (time.monotonic() - began)
        question = {"key": key, "plain": plain.to_json(), "seconds": left, "failed": failed}
        try:
            with Launcher(TUNE, job.to_json()) as launcher:
                answer, silent = launcher.ask(question, max(left, 0.0) + OVERTIME)
        except KeyboardInterrupt:
            cache.acquit(key)  # what it was timing did not end it
            raise
        for line in answer.get("said", []):
            print(line)
        if not silent:
            break
        known = cache.read(key)
        if known and known.measuring == TOGETHER:
            print(f"warning: plain PyTorch is kept: the process that timed the {WHOLE} {silent}")
            return cache.give_up(known, silent)
        if known is None or known.done or not known.measuring or known.measuring in failed:
            raise ValueError(f"the process that measured: {silent}")
        print(f"warning: {known.measuring} is left out: the process that timed it {silent}")
        failed |= known.left_out()
        if time.monotonic() - began > seconds:
            return known
    if answer["error"]:
        raise ValueError(answer["error"])
    return Entry.from_json(answer["entry"])


def serve() -> None:
    """The process of `tune_apart`: reads a job, and then what is to be measured for it.

    Answers with {"entry": what was found or null, "error": why not, "said": lines for people}.
    """
    end_with_parent()
    # Whatever prints meanwhile must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.from_json(json.loads(sys.stdin.readline()))
    print("{}", file=answers, flush=True)  # ready
    for line in sys.stdin:
        print(json.dumps(answered(job, json.loads(line))), file=answers, flush=True)


def answered(job: Job, question: dict[str, Any]) -> dict[str, Any]:
    said: list[str] = []
    plain = Choice.from_json(question["plain"])
    try:
        entry = tune(
            job, question["key"], plain, question["seconds"], question["failed"], said.append
        )
    except DeviceLost:
        raise
    except Exception as error:  # a run goes on, whatever is wrong here
        return {"entry": None, "error": one_line(error), "said": said}
    return {"entry": entry.to_json(), "error": "", "said": said}


def forget(bench: DeviceBench) -> None:
    """Free the memory of models, graphs and compiled code."""
    bench.bases.clear()
    bench.parts.models.clear()
    bench.parts.batches.clear()
    torch._dynamo.config.recompile_limit = bench.parts.limit_before
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
