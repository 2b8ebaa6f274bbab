"""How times are taken: variants in turn, in one process, many times; medians, and how far they scatter."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch


def interleave(
    variants: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    deadline: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every call: A B C A B C ..., after `warmup` rounds that do not count, device work included.

    After `deadline`, of `time.perf_counter`, no round begins but the first three that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warmup + repeats):
        if round_ >= warmup + 3 and time.perf_counter() > deadline:
            break
        for name, call in variants.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in seconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}
