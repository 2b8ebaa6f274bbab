"""The search: from plain PyTorch on, one candidate after the other; what wins is carried on.

It knows neither torch nor a clock. `Bench` stands for the device: it judges, and it times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanovlm_fast.tune.candidates import Candidate, Choice
from nanovlm_fast.tune.measure import Comparison, Unsettled, level_for

LEAST_GAIN = 0.003  # of the step; what gains less is not worth another code path
TAKEN = "taken"
LEFT_OUT = "left out"  # failed, wrong, hung or died: not tried again for this key
NOT_MEASURED = "not measured"
WHOLE = "whole step"
TOGETHER = "all that was taken"  # the row of the last comparison


class Fails(Exception):
    """A candidate that cannot be taken, and why."""


class Bench(Protocol):
    """What the search needs of a device."""

    def gate(self, choice: Choice, part: str) -> str | None:
        """Why the choice must not be taken: what is wrong with its results; None if right."""

    def compare(self, base: Choice, choice: Choice, part: str, level: float) -> Comparison:
        """Time both in a part of the step. Raises `Fails` if the choice does not run."""

    def whole_seconds(self) -> float:
        """How long it takes to compare two choices in the whole step, as far as that is known."""

    def share(self, part: str, gain: float, base: float) -> float:
        """The share of the whole step that is gained by `gain` of `base` seconds of a part."""


@dataclass
class Row:
    """What was found out about a candidate. Seconds are those of the part that was timed."""

    name: str
    part: str
    verdict: str
    why: str = ""
    seconds: float | None = None
    base: float | None = None  # seconds of what it was compared with
    low: float | None = None  # the interval of the ratio of the two
    high: float | None = None
    of_step: float | None = None  # the gain as a share of the step; below 0: a loss

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Row:
        """The row that `to_json` wrote. Raises ValueError for anything else."""
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            raise ValueError("a row has other fields")
        for name, kind in kinds.items():
            allowed = (str,) if kind == "str" else (int, float, type(None))
            if type(values[name]) not in allowed:
                raise ValueError(f"a row's {name} is {values[name]!r:.40}")
        return cls(**values)


@dataclass
class Found:
    """What a search has found so far."""

    choice: Choice
    rows: list[Row] = field(default_factory=list)
    measuring: str = ""  # the candidate that is being timed; a process that dies leaves its name
    done: bool = False


@dataclass(frozen=True)
class Limits:
    """When to stop: `now()` past `deadline`. `note` is told of every change of what was found.

    Candidates leave the seconds that comparing the whole step needs, if these are at most `kept`.
    """

    now: Callable[[], float]
    deadline: float
    note: Callable[[Found], None] = lambda found: None
    kept: float = 0.0

    @property
    def left(self) -> float:
        return self.deadline - self.now()


def search(
    plain: Choice,
    candidates: Sequence[Candidate],
    bench: Bench,
    limits: Limits,
    left_out: dict[str, str] | None = None,
) -> Found:
    """Try the candidates in turn. `left_out` are those that failed before, with the reasons.

    Spent time ends it with the best choice so far.
    """
    reasons = left_out or {}
    failed = [candidate for candidate in candidates if candidate.name in reasons]
    # First of all, so that a process that dies over the next candidate has noted them.
    found = Found(plain, [Row(one.name, one.part, LEFT_OUT, reasons[one.name]) for one in failed])
    level = level_of(candidates)
    for candidate in candidates:
        wanted = candidate.apply(found.choice)
        if candidate in failed or wanted == found.choice:
            continue
        needed = bench.whole_seconds()
        kept = needed if needed <= limits.kept else 0.0
        if (left := limits.left) - kept <= candidate.seconds:
            why = no_time(left, f", kept for the {WHOLE}" if left > candidate.seconds else "")
            row = Row(candidate.name, candidate.part, NOT_MEASURED, why)
        else:
            row = try_one(candidate, found, bench, limits, level)
        found.rows.append(row)
        if row.verdict == TAKEN:
            found.choice = wanted
        found.measuring = ""
        limits.note(found)
    check_whole(plain, found, bench, limits, level)
    found.done = True
    limits.note(found)
    return found


def level_of(candidates: Sequence[Candidate]) -> float:
    """The level of every interval of a search, so that equal candidates rarely switch any."""
    return level_for(len(candidates) + 1)


def no_time(left: float, more: str = "") -> str:
    return f"{left:.0f} s left{more}" if left > 0 else "the time was spent"


def try_one(candidate: Candidate, found: Found, bench: Bench, limits: Limits, level: float) -> Row:
    """Gate a candidate over the winner so far, then time the two."""
    wanted = candidate.apply(found.choice)
    if candidate.gated and (wrong := bench.gate(wanted, candidate.part)):
        return Row(candidate.name, candidate.part, LEFT_OUT, wrong)
    found.measuring = candidate.name
    limits.note(found)
    return timed(Row(candidate.name, candidate.part, ""), (found.choice, wanted), bench, level)


def timed(row: Row, pair: tuple[Choice, Choice], bench: Bench, level: float) -> Row:
    """Time two choices in the row's part, and fill in what came out."""
    try:
        return judged(row, bench.compare(*pair, row.part, level), bench)
    except Fails as error:
        row.verdict = LEFT_OUT
        row.why = str(error)
    except Unsettled as error:  # the device's fault, and not the candidate's
        row.verdict = NOT_MEASURED
        row.why = str(error)
    return row


def judged(row: Row, compared: Comparison, bench: Bench) -> Row:
    """Fill in a row by the rule: the interval excludes 1, and the gain is worth it."""
    row.seconds = compared.candidate
    row.base = compared.base
    row.low = compared.low
    row.high = compared.high
    row.of_step = bench.share(row.part, compared.base * (1 - compared.ratio), compared.base)
    if compared.faster and row.of_step >= LEAST_GAIN:
        row.verdict = TAKEN
    elif compared.faster:
        row.verdict = "gains too little"
    else:
        row.verdict = "slower" if compared.slower else "same"
    return row


def check_whole(plain: Choice, found: Found, bench: Bench, limits: Limits, level: float) -> None:
    """Last, plain against chosen in the whole step; a choice that loses there is not kept."""
    if found.choice == plain:
        return
    row = Row(TOGETHER, WHOLE, NOT_MEASURED)
    needed = bench.whole_seconds()
    # Not all of them: it is an estimate, and the last candidate may have taken some.
    if (left := limits.left) <= needed / 2:
        row.why = no_time(left, f" of about {needed:.0f} s")
    elif wrong := bench.gate(found.choice, WHOLE):
        row.verdict = LEFT_OUT
        row.why = f"together: {wrong}"
    else:
        found.measuring = row.name
        limits.note(found)
        row = timed(row, (plain, found.choice), bench, level)
    found.rows.append(row)
    found.measuring = ""
    if row.verdict not in (TAKEN, NOT_MEASURED):
        found.choice = plain
