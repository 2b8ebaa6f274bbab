"""The statistics of timings.

Intervals have the coverage that they state, and equal things are reported as equal.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from bench.device_facts import product_rates
from bench.harness import machine, timing
from bench.harness.machine import Watch
from bench.harness.passes import copy_bandwidth
from bench.harness.timing import (
    AGAIN,
    Difference,
    difference,
    interleave,
    interval,
    noise_of,
    summary,
)
from bench.roofline import measured_rates


def skewed(rng: random.Random, n: int, scale: float = 1.0) -> list[float]:
    """Times as machines give them, with a floor and a long tail.

    The median is 1 + ln 2 / 10, times `scale`.
    """
    return [scale * (1 + rng.expovariate(10)) for _ in range(n)]


@pytest.mark.parametrize("n", [7, 15, 30, 101])
def test_the_interval_of_a_median_covers_it_as_often_as_it_says(n):
    rng, true, trials = random.Random(n), 1 + math.log(2) / 10, 2000
    found = [interval(skewed(rng, n)) for _ in range(trials)]
    covered = sum(low <= true <= high for low, high in found) / trials
    assert 0.94 <= covered <= 0.995  # at least 95%, and no wider than a step of order statistics


def test_the_interval_by_hand():
    assert interval([float(i) for i in range(1, 31)]) == (
        10.0,
        21.0,
    )  # the ranks that a textbook gives for n = 30
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0) and interval([1.0, 2.0]) == (0.0, math.inf)


def test_equal_things_are_the_same_and_different_ones_are_not():
    rng, same, faster = random.Random(0), 0, 0
    for _ in range(500):
        base = skewed(rng, 30)
        same += difference(skewed(rng, 30), base).same
        other = difference(skewed(rng, 30, scale=0.5), base)
        faster += other.low <= 2.0 <= other.high and not other.same
    assert same >= 0.95 * 500 and faster >= 0.95 * 500


def test_a_difference_reads_as_times_as_fast():
    found = difference([1.0] * 9, [2.0] * 9)
    assert (found.ratio, found.low, found.high) == (2.0, 2.0, 2.0) and str(
        found
    ) == "2.00x (2.00-2.00)"
    assert difference(
        [1.0] * 9, [2.0] * 9, self_check=1.5
    ).same  # where equal things differed by 150%
    assert (
        str(difference([1.0], [2.0])) == "2.00x (too few times to tell)"
        and difference([1.0], [2.0]).same
    )
    assert str(Difference(1.01, 0.98, 1.04)) == "same (0.98-1.04)"


def test_variants_take_turns_and_each_begins_a_round():
    calls: list[str] = []
    seconds = interleave(
        {name: lambda n=name: calls.append(n) for name in "abc"}, repeats=3, warmup=1
    )
    assert calls == list("abcbcacababc") and [len(times) for times in seconds.values()] == [3, 3, 3]


def test_the_first_variant_against_itself():
    calls: list[str] = []
    variants = {name: lambda n=name: calls.append(n) for name in "ab"}
    seconds = interleave(variants, repeats=2, warmup=0, self_check=True)
    assert calls == list("aba" + "baa") and len(seconds[AGAIN]) == 2
    assert noise_of(seconds) >= 0 and seconds.keys() == {"a", "b"}
    assert (
        noise_of({"a": [1.0, 1.0], AGAIN: [1.1, 1.1]})
        == noise_of({"a": [1.1], AGAIN: [1.0]})
        == pytest.approx(0.1)
    )


def test_a_deadline_leaves_three_rounds():
    seconds = interleave({"a": lambda: None}, repeats=50, deadline=time.perf_counter() - 1)
    assert len(seconds["a"]) == 3


def test_a_summary_has_the_quantiles():
    found = summary([float(i) for i in range(101)])
    names = ("p05", "lower_quartile", "median", "upper_quartile", "p95")
    assert [found[name] for name in names] == [5, 25, 50, 75, 95] and "noise" not in found
    assert summary([5.0], noise=0.1) == dict.fromkeys(names, 5.0) | {"noise": 0.1}


def test_the_machine_is_read_before_and_after(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(timing, "WATCH", watch)
    assert watch.record() is None
    interleave({"a": lambda: time.sleep(0.01)}, repeats=3)
    found = watch.record()
    assert (
        found["seconds"] > 0.03
        and {"load_average", "cpu_mhz"} <= found["before"].keys() & found["after"].keys()
    )
    assert found["warnings"] == []  # too short to tell
    assert ("gpu" in found["after"]) == torch.cuda.is_initialized()


@pytest.mark.slow
@pytest.mark.alone
def test_others_that_compute_are_told_apart_from_our_own_work(monkeypatch):
    """A process of our group (a worker) is our own work, one of another group is not."""
    found = {}
    for foreign in (False, True):
        process = subprocess.Popen(
            [sys.executable, "-c", "while True: pass"], start_new_session=foreign
        )
        try:
            used = machine.cpu_seconds()
            with Watch() as beside:
                time.sleep(2)
            found[foreign] = machine.cpu_seconds()[1] - used[1]
        finally:
            process.kill()
            process.wait()
    assert found[False] > 0.3 > found[True] and beside.others > 0.3
    monkeypatch.setattr(machine, "BUSY", 0.0)
    (warning,) = beside.record()["warnings"]
    assert warning.startswith("other processes used") and warning.endswith("CPUs meanwhile")


def test_a_gpu_that_slows_down_is_said(monkeypatch):
    lines = {
        "clocks_throttle_reasons.active": "1755, 1980, 2619, 312.5, [N/A], 61, 0x0000000000000024"
    }

    def query(fields, *_):  # as an older driver answers
        return lines.get(fields[-1])

    class Properties:
        uuid = "0"

    monkeypatch.setattr(machine, "query_gpu", query)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with Watch() as watch:
        pass
    found = watch.record()
    assert (
        found["after"]["gpu"]["clocks.sm"] == 1755 and found["after"]["gpu"]["power.limit"] is None
    )
    assert found["warnings"] == ["the GPU slowed down: power cap, thermal"]
    lines.clear()
    assert machine.gpu_reading() == {}


def tensors_of(call: Callable) -> list[torch.Tensor]:
    """The tensors that a timed call holds, as a closure or as arguments."""
    held = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    held += getattr(call, "args", ())
    return [value for value in held if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("rates", [copy_bandwidth, measured_rates, product_rates])
def test_copies_and_products_are_timed_on_random_data(rates, monkeypatch):
    """Constants take less power, and a GPU then clocks higher than it does on data."""
    found = []

    def kept(calls: dict[str, Callable], *options: int, **named: int) -> dict[str, list[float]]:
        found.extend(tensors_of(call) for call in calls.values())
        return interleave(calls, repeats=1, warmup=0)

    monkeypatch.setitem(rates.__globals__, "interleave", kept)
    rates(torch.device("cpu"))
    assert found and all(len(tensors) >= 2 for tensors in found)
    for tensor in (tensor for tensors in found for tensor in tensors):
        values = tensor.flatten()[:4096].float()
        assert len(values.unique()) > 200 and len(tensor.flatten()[-4096:].unique()) > 200
