"""The gate: whether a choice computes what plain PyTorch computes. Nothing is timed before it.

The rule is the project's: an output or a gradient may be twice as far from the float32 result as
plain PyTorch is in the run's type. It holds for the largest difference and for the norm of all. A
second run must give the same bits. Memory that nobody wrote holds NaN.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanovlm_fast.command import one_line
from nanovlm_fast.ranks import end_with_parent
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.parts import LAUNCHES, UPDATE, Job, Parts, Results
from nanovlm_fast.tune.search import WHOLE

# Shares of the float32 result by which results may be off in any case. In float32 plain has no
# error to double; a chain of blocks rounds some thousand sums in another order.
SLACK = 1e-4
# In 16-bit types plain happens to hit some values exactly: of the norm of all, and of results of so
# few values, as the loss is, that their largest error is luck.
SLACK_LUCK = 1e-3
FEW = 8
PLAIN = Choice()


class Gate:
    """Judges choices in this process. What plain computes is kept."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.kept: dict[tuple[str, str, torch.dtype], Results] = {}

    def __call__(self, choice: Choice, part: str) -> str | None:
        """What is wrong with the choice's results; None if they are right."""
        # Together is judged on few blocks: errors add up over many in plain too.
        part = "blocks" if part in (WHOLE, LAUNCHES) else part
        run_type = self.parts.job.type
        # In float32 first: nothing hides behind rounding there, be it 1%.
        cases = [("odd", torch.float32, "none"), ("real", run_type, self.mode(choice))]
        if run_type != torch.float32:
            cases.insert(1, ("odd", run_type, "none"))
        if part == UPDATE:  # which has no rows
            cases = [case for case in cases if case[0] == "odd"]
        for size, dtype, mode in cases:
            if wrong := self.judge(choice, part, size, dtype, mode):
                return wrong
        return None

    @staticmethod
    def mode(choice: Choice) -> str:
        """How the choice is compiled here: graphs change when kernels run, not what they do."""
        return "default" if choice.compile == "reduce-overhead" else choice.compile

    def judge(
        self, choice: Choice, part: str, size: str, dtype: torch.dtype, mode: str
    ) -> str | None:
        if dtype == torch.float32 and self.parts.job.type != torch.float32:
            # The attention backends of a GPU take 16-bit types alone.
            choice = Choice(choice.kernels)
        truth = self.plain(part, size, torch.float32)
        plain = self.plain(part, size, dtype)
        call = self.call(part, choice, size, dtype, mode)
        if mode == "none":
            with poisoned():
                ours = call()
                again = call()
        else:
            # As it is timed and trained. The compiler's own additions are atomic on a GPU, with
            # any kernels; asked for a fixed order it would make other code.
            ours = again = call()
        where = f"{part}, {size} sizes, {str(dtype).removeprefix('torch.')}"
        wrong = difference(ours, again, plain, truth, dtype)
        return f"{wrong} ({where})" if wrong else None

    def call(
        self, part: str, choice: Choice, size: str, dtype: torch.dtype, mode: str = "none"
    ) -> Callable[[], Results]:
        if part == UPDATE:
            return self.parts.update(choice, size, dtype)
        return self.parts.call(part, choice, size, dtype, mode)

    def plain(self, part: str, size: str, dtype: torch.dtype) -> Results:
        key = (part, size, dtype)
        if key not in self.kept:
            self.kept[key] = self.call(part, PLAIN, size, dtype)()
        return self.kept[key]


def difference(
    ours: Results, again: Results, plain: Results, truth: Results, dtype: torch.dtype
) -> str | None:
    """The first output or gradient that breaks the rule, and how; None if none does."""
    if ours.keys() != truth.keys():
        odd = sorted(ours.keys() ^ truth.keys())
        return f"{odd[0]} is {'missing' if odd[0] in truth else 'new'}"
    for name, exact in truth.items():
        if ours[name].shape != exact.shape:
            return f"{name} has shape {tuple(ours[name].shape)}, not {tuple(exact.shape)}"
        if not torch.equal(ours[name], again[name]):
            return f"{name}: not the same bits in a second run, or never written"
        if far := too_far(ours[name], plain[name], exact, dtype):
            return f"{name}: {far}"
    return None


def too_far(ours: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> str | None:
    exact = exact.float()
    off = (ours.float() - exact).abs()
    own = (plain.float() - exact).abs()
    if not exact.numel():
        return None
    of_norm = SLACK if dtype == torch.float32 else SLACK_LUCK
    of_largest = of_norm if exact.numel() <= FEW else SLACK
    largest = off.max(), own.max(), exact.abs().max()
    norms = off.norm(), own.norm(), exact.norm()
    for kind, (error, allowance, scale), slack in (
        ("largest", largest, of_largest),
        ("norm of the", norms, of_norm),
    ):
        allowed = 2 * allowance + slack * scale
        if not error <= allowed:  # NaN is not
            return f"{kind} error {float(error):.2e}, allowed {float(allowed):.2e}"
    return None


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, and FlashAttention adds in a fixed order."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def serve() -> None:
    """The process of `launcher.py`: reads a job and then choices, a line of JSON each.

    Answers each choice with {"wrong": what is wrong or null}.
    """
    end_with_parent()
    # Whatever prints meanwhile must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.from_json(json.loads(sys.stdin.readline()))
    gate = Gate(Parts(job))
    print("{}", file=answers, flush=True)  # ready
    for line in sys.stdin:
        question = json.loads(line)
        wrong = judged(gate, Choice.from_json(question["choice"]), question["part"])
        print(json.dumps({"wrong": wrong}), file=answers, flush=True)


def judged(gate: Gate, choice: Choice, part: str) -> str | None:
    try:
        return gate(choice, part)
    except Exception as error:  # whatever a kernel or a compiler raises is an answer
        return f"{type(error).__name__}: {one_line(error)[:300]}"
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
