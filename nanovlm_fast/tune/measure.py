"""Which of two is faster: pairs of readings, and the interval of their ratio.

Nothing in here knows what is timed, or by which clock. No distribution is assumed: the interval of
a median comes from order statistics.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

CLOCKS_APART = 0.02  # pairs at clocks that differ by more are thrown away
SETTLING = 2  # uncounted pairs: caches, and clocks that rise
# Five pairs, all at least this much slower, end a comparison: what is not taken needs no interval.
HOPELESS = 1.2
HOPELESS_PAIRS = 5
# An interval needs as many pairs as make its level possible, and more to be narrow.
PAIRS = 40


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """(low, high) that holds the true median with probability `level`: two order statistics.

    The true median lies below the k-th smallest of n independent values with the probability that
    n throws of a coin show fewer than k heads. Where n is too small for the level, the smallest and
    the largest value are returned; below three values, 0 and inf.
    """
    ordered = sorted(values)
    n = len(values)
    if n < 3:
        return 0.0, math.inf
    k = 1
    below = 0.5**n  # the probability of fewer than k heads
    while k < n // 2 and 2 * (below + math.comb(n, k) * 0.5**n) <= 1 - level:
        below += math.comb(n, k) * 0.5**n
        k += 1
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True)
class Reading:
    """Seconds of one call, and the device's clock meanwhile in any unit (None: not known)."""

    seconds: float
    clock: float | None = None


class Unsettled(Exception):
    """Too few pairs of readings were taken at one clock."""


Read = Callable[[], Reading]


@dataclass(frozen=True)
class Comparison:
    """Two calls against each other. `ratio` is the candidate's time over the base's."""

    base: float  # seconds, medians
    candidate: float
    ratio: float
    low: float  # the true ratio lies in [low, high]
    high: float
    pairs: int

    @property
    def faster(self) -> bool:
        """Whether the interval says that the candidate is faster."""
        return self.high < 1

    @property
    def slower(self) -> bool:
        return self.low > 1


def level_for(comparisons: int) -> float:
    """The level at which that many comparisons of equal things all come out equal, 19 in 20 times.

    Only a candidate that seems faster is taken, so one side of the interval counts.
    """
    return 1 - 2 * 0.05 / max(comparisons, 1)


def least_pairs(level: float) -> int:
    """With fewer values, the widest interval that there is would be too narrow for the level."""
    return math.ceil(1 - math.log2(1 - level))


def compare(base: Read, candidate: Read, level: float, pairs: int = PAIRS) -> Comparison:
    """Take readings in turns, the order of a pair changing, and compare them.

    Raises Unsettled if too few pairs were at one clock.
    """
    kept = []
    for number in range(SETTLING + pairs):
        if number % 2:
            second = candidate()
            first = base()
        else:
            first = base()
            second = candidate()
        if number >= SETTLING and same_clock(first, second):
            kept.append((first.seconds, second.seconds))
        if hopeless(kept):
            return slower_by(kept)
    if len(kept) < min(least_pairs(level), pairs):
        raise Unsettled(f"the clock changed within {pairs - len(kept)} of {pairs} pairs")
    ratios = ratios_of(kept)
    low, high = interval(ratios, level) if len(kept) >= least_pairs(level) else (0.0, math.inf)
    return comparison(kept, low, high)


def hopeless(kept: list[tuple[float, float]]) -> bool:
    """Whether a few pairs already show a candidate that no further one would make the faster."""
    return len(kept) == HOPELESS_PAIRS and min(ratios_of(kept)) > HOPELESS


def slower_by(kept: list[tuple[float, float]]) -> Comparison:
    """Of few pairs, that the candidate is slower: it is left at that, and not at how much."""
    ratios = ratios_of(kept)
    return comparison(kept, min(ratios), max(ratios))


def ratios_of(kept: list[tuple[float, float]]) -> list[float]:
    return [second / first for first, second in kept]


def comparison(kept: list[tuple[float, float]], low: float, high: float) -> Comparison:
    base = statistics.median(first for first, _ in kept)
    candidate = statistics.median(second for _, second in kept)
    return Comparison(base, candidate, statistics.median(ratios_of(kept)), low, high, len(kept))


def same_clock(first: Reading, second: Reading) -> bool:
    """Whether two readings were taken at nearly the same clock, as far as that is known."""
    if first.clock is None or second.clock is None:
        return True
    return abs(first.clock - second.clock) <= CLOCKS_APART * max(first.clock, second.clock)
