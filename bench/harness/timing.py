"""How times are taken: variants interleaved in one process, medians, their scatter and differences.

No distribution is assumed. The confidence interval of a median comes from order statistics, that of
the ratio of two medians from both intervals. A variant that is timed against itself in the same
rounds (`self_check`) shows what difference the machine reports where there is none; that share
widens every reported interval.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness.machine import WATCH
from nanovlm_fast.tune.measure import interval

AGAIN = "self-check"  # the name under which the first variant is timed a second time


def interleave(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    deadline: float = math.inf,
    progress: Callable[[], object] = lambda: None,
    self_check: bool = False,
) -> dict[str, list[float]]:
    """Return the seconds of every call, device work included, after `warmup` uncounted rounds.

    The variants take turns, and each round starts with the next one: A B C, B C A, C A B, ...
    At least three rounds are counted; after `deadline` (of `time.perf_counter`) no further round
    begins. With `self_check` the first variant runs twice per round; its second times are under
    `AGAIN`, for `noise_of`. What the machine does meanwhile is recorded for the result file.
    """
    calls = list(variants.items())
    if self_check and calls:
        calls.append((AGAIN, calls[0][1]))
    seconds: dict[str, list[float]] = {name: [] for name, _ in calls}
    with WATCH:
        for round_ in range(warmup + repeats):
            if round_ >= warmup + 3 and time.perf_counter() > deadline:
                break
            # Rotating the order spreads drift (heat, other processes) evenly over the variants.
            first = round_ % max(len(calls), 1)
            for name, call in calls[first:] + calls[:first]:
                synchronize()  # work of the previous variant must not run into this one's time
                start = time.perf_counter()
                call()
                synchronize()  # a CUDA call returns before its kernels have run
                if round_ >= warmup:
                    seconds[name].append(time.perf_counter() - start)
                progress()
    return seconds


def synchronize() -> None:
    """Wait for what was launched on the current GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_bytes(count: int, device: torch.device) -> Tensor:
    """(count,) uint8, uniform: what is timed must not move memory that is all zeros.

    Bits that do not change take less power, and a GPU that is not held back by its power clocks
    higher: copies and products of constants are faster than those of data.
    """
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)


def noise_of(seconds: dict[str, list[float]]) -> float:
    """How much the medians of two timings of the same variant differ, as a share.

    Removes the self-check's times from `seconds`.
    """
    again = statistics.median(seconds.pop(AGAIN))
    first = statistics.median(next(iter(seconds.values())))
    return max(again, first) / min(again, first) - 1


def summary(seconds: list[float], noise: float | None = None) -> dict[str, float]:
    """Median, quartiles, 5th and 95th percentile in seconds; `noise` of the self-check if given."""
    if len(seconds) > 1:
        cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    else:
        cuts = seconds * 19  # `quantiles` refuses a single value
    values = {
        "median": statistics.median(seconds),
        "lower_quartile": cuts[4],
        "upper_quartile": cuts[14],
        "p05": cuts[0],
        "p95": cuts[18],
    }
    return values if noise is None else {**values, "noise": noise}


@dataclass(frozen=True)
class Difference:
    """`ratio`: how many times as fast; the true ratio lies in [low, high] with at least 95%."""

    ratio: float
    low: float
    high: float

    @property
    def same(self) -> bool:
        """Whether the measurement cannot tell the two apart."""
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{self.ratio:.2f}x (too few times to tell)"
        return f"{'same' if self.same else f'{self.ratio:.2f}x'} ({self.low:.2f}-{self.high:.2f})"


def difference(times: list[float], against: list[float], self_check: float = 0.0) -> Difference:
    """How many times as fast `times` are as `against`, both in seconds: the ratio of the medians.

    The intervals of both medians hold at once with 95% (each with 97.5%), so the ratio lies between
    the ratios of their ends. `self_check` (see `noise_of`) widens that: a difference which the
    machine also shows between equal things is no difference.
    """
    low, high = interval(times, 0.975)
    best, worst = interval(against, 0.975)
    ratio = statistics.median(against) / statistics.median(times)
    wider = 1 + self_check
    return Difference(ratio, best / high / wider, worst / low * wider if low else math.inf)
