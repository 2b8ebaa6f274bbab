"""How times are taken: variants in turn, in one process, many times; medians, how far they scatter, what differs.

No distribution is assumed. A median's interval comes from order statistics; of two medians' ratio, from both intervals.
A variant timed against itself in the same rounds (`self_check`) shows what the machine makes of no difference at all,
and that widens what is reported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.machine import WATCH

AGAIN = "self-check"  # the first variant, a second time


def interleave(
    variants: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    deadline: float = math.inf,
    progress: Callable[[], object] = lambda: None,
    self_check: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every call, device work included, after `warmup` rounds that do not count.

    The variants take turns, and each round begins with another one: A B C, B C A, C A B, ... After `deadline`, of
    `time.perf_counter`, no round begins but the first three that count. With `self_check` the first variant takes part
    twice; its second times are under `AGAIN`, for `noise_of`. What the machine does meanwhile goes to the result file.
    """
    calls = list(variants.items())
    if self_check and calls:
        calls.append((AGAIN, calls[0][1]))
    seconds: dict[str, list[float]] = {name: [] for name, _ in calls}
    with WATCH:
        for round_ in range(warmup + repeats):
            if round_ >= warmup + 3 and time.perf_counter() > deadline:
                break
            first = round_ % max(len(calls), 1)
            for name, call in calls[first:] + calls[:first]:
                synchronize()
                start = time.perf_counter()
                call()
                synchronize()
                if round_ >= warmup:
                    seconds[name].append(time.perf_counter() - start)
                progress()
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def noise_of(seconds: dict[str, list[float]]) -> float:
    """What the self-check of `interleave` found: by what share the medians of one and the same variant differ.

    Takes the self-check's times out of `seconds`.
    """
    again = statistics.median(seconds.pop(AGAIN))
    first = statistics.median(next(iter(seconds.values())))
    return max(again, first) / min(again, first) - 1


def summary(seconds: list[float], noise: float | None = None) -> dict[str, float]:
    """Median, quartiles, 5th and 95th percentile, in seconds; `noise` of the self-check if there was one."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else seconds * 19
    values = {
        "median": statistics.median(seconds),
        "lower_quartile": cuts[4],
        "upper_quartile": cuts[14],
        "p05": cuts[0],
        "p95": cuts[18],
    }
    return values if noise is None else {**values, "noise": noise}


def interval(seconds: list[float], level: float = 0.95) -> tuple[float, float]:
    """(low, high) around the median, which lies inside with probability `level`: two order statistics.

    The true median is below the k-th smallest of n independent values as seldom as n throws of a coin show fewer than k
    heads. Where n is too small for the level these are the smallest and the largest; below three values, 0 and inf.
    """
    ordered, n = sorted(seconds), len(seconds)
    if n < 3:
        return 0.0, math.inf
    k, below = 1, 0.5**n  # `below`: the chance of fewer than k heads
    while k < n // 2 and 2 * (below + math.comb(n, k) * 0.5**n) <= 1 - level:
        below += math.comb(n, k) * 0.5**n
        k += 1
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True)
class Difference:
    """`ratio`: how many times as fast; the truth lies in [low, high] with 95% and more."""

    ratio: float
    low: float
    high: float

    @property
    def same(self) -> bool:
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{self.ratio:.2f}x (too few times to tell)"
        return f"{'same' if self.same else f'{self.ratio:.2f}x'} ({self.low:.2f}-{self.high:.2f})"


def difference(times: list[float], against: list[float], self_check: float = 0.0) -> Difference:
    """How many times as fast `times` are as `against`: the ratio of the medians, from the seconds of both.

    Both medians' intervals hold at once with 95% (each with 97.5%), so the ratio lies between those of their ends,
    widened by the share that `self_check` (see `noise_of`) found between equal things.
    """
    (low, high), (best, worst) = interval(times, 0.975), interval(against, 0.975)
    ratio, wider = statistics.median(against) / statistics.median(times), 1 + self_check
    return Difference(ratio, best / high / wider, worst / low * wider if low else math.inf)
