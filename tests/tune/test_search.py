"""The search with planted speeds and failures: no device, no clock, no compiler."""

from __future__ import annotations

import random

import pytest

from nanovlm_fast.model.compiling import INDUCTOR
from nanovlm_fast.model.ops import KERNELS
from nanovlm_fast.tune.candidates import (
    GPU_GROUPS,
    Candidate,
    Choice,
    cpu_candidates,
    gpu_candidates,
)
from nanovlm_fast.tune.measure import (
    CLOCKS_APART,
    Comparison,
    Reading,
    Unsettled,
    compare,
    interval,
    least_pairs,
    level_for,
)
from nanovlm_fast.tune.search import (
    LEFT_OUT,
    NOT_MEASURED,
    TAKEN,
    TOGETHER,
    WHOLE,
    Fails,
    Found,
    Limits,
    search,
)

ALL = frozenset({"kernels", "attention", "vision_attention", "inductor", "compile"})
BACKENDS = {"attention": ("torch", "flash_attn"), "vision_attention": ("cudnn",)}
PLAIN = Choice(compile="auto")
PARTS = {"language": 30.0, "vision": 40.0, "ends": 10.0, "update": 3.0}  # milliseconds of the step


class Simulated:
    """A device on which every candidate changes the time of its part by a planted factor."""

    def __init__(self, speeds: dict[str, float], noise: float = 0.0, seed: int = 0):
        self.speeds = speeds
        self.noise = noise
        self.rng = random.Random(seed)
        self.wrong: dict[str, str] = {}
        self.raising: dict[str, str] = {}
        self.gated: list[str] = []
        self.timed: list[str] = []
        self.time = 0.0  # that has passed
        self.whole = 0.0  # seconds to compile two whole steps

    def new_in(self, choice: Choice) -> list[str]:
        names = [*choice.kernels, *choice.inductor]
        names += [f"attention {choice.attention}", f"vision_attention {choice.vision_attention}"]
        return [*names, "CUDA graphs"] if choice.compile == "reduce-overhead" else names

    def seconds(self, choice: Choice, part: str) -> float:
        parts = {"blocks": 70.0, "launches": 70.0, WHOLE: 80.0, **PARTS}
        value = parts[part] / 1e3
        for name in self.new_in(choice):
            value *= self.speeds.get(name, 1.0)
        return value

    def read(self, choice: Choice, part: str) -> Reading:
        noisy = self.seconds(choice, part) * (1 + self.rng.gauss(0, self.noise))
        self.time += noisy
        return Reading(noisy)

    def gate(self, choice: Choice, part: str) -> str | None:
        self.gated += [name for name in self.new_in(choice) if name not in self.gated]
        return next((why for name, why in self.wrong.items() if name in self.new_in(choice)), None)

    def compare(self, base: Choice, choice: Choice, part: str, level: float) -> Comparison:
        for name, why in self.raising.items():
            if name in self.new_in(choice):
                raise Fails(why)
        self.time += self.whole if part == WHOLE else 0.0
        before = self.new_in(base)
        self.timed += [name for name in self.new_in(choice) if name not in before]
        return compare(lambda: self.read(base, part), lambda: self.read(choice, part), level)

    def whole_seconds(self) -> float:
        return self.whole

    def share(self, part: str, gain: float, base: float) -> float:
        return gain / 0.08


def run(
    bench: Simulated,
    budget: float = 1e9,
    left_out: dict[str, str] | None = None,
    kept: float = 0.0,
) -> tuple[Found, list[Found]]:
    notes: list[Found] = []

    def note(found: Found) -> None:
        notes.append(Found(found.choice, list(found.rows), found.measuring, found.done))

    limits = Limits(lambda: bench.time, budget, note, kept)
    candidates = gpu_candidates(ALL, compiled=True, backends=BACKENDS)
    return search(PLAIN, candidates, bench, limits, left_out), notes


def test_every_kernel_and_option_is_a_candidate_once():
    named = [kernel for group in GPU_GROUPS for kernel in group.kernels if kernel in KERNELS]
    assert sorted(named) == sorted(KERNELS)
    names = [c.name for c in gpu_candidates(ALL, True, BACKENDS)]
    assert len(set(names)) == len(names) and set(INDUCTOR) <= set(names)
    # What the user has set, and what needs a compiler, is not tried.
    assert not gpu_candidates(frozenset(), compiled=True)
    assert not set(INDUCTOR) & {c.name for c in gpu_candidates(ALL, compiled=False)}


def test_planted_speeds_give_the_planted_winner_in_the_planted_order():
    speeds = {"document_attention": 0.9, "rotary": 0.8, "layer_norm": 0.7, "combo_kernels": 0.95}
    bench = Simulated({**speeds, "attention flash_attn": 1.2}, noise=0.01)
    found, _ = run(bench)
    # rotary takes the place of document_attention, which it makes idle
    assert found.choice.kernels == ("rotary", "layer_norm")
    assert found.choice.inductor == ("combo_kernels",)
    assert (found.choice.attention, found.choice.compile) == ("auto", "auto")
    order = [row.name for row in found.rows]
    assert order[:4] == ["document_attention", "rotary", "attention torch", "attention flash_attn"]
    assert order[-2:] == ["CUDA graphs", "all that was taken"] and found.rows[-1].verdict == TAKEN
    assert order.index("layer_norm") < order.index("rms_norm") < order.index("combo_kernels")
    verdicts = {row.name: row.verdict for row in found.rows}
    assert verdicts["attention flash_attn"] == "slower" and verdicts["swiglu"] == "same"
    assert set(bench.timed) <= {*bench.gated, "CUDA graphs"}, "timed before it was shown right"


def test_a_gain_below_a_third_of_a_percent_of_the_step_keeps_plain():
    # 1% of a part that is an eighth of the step
    bench = Simulated({"embed_splice": 0.98}, noise=0.0001)
    found, _ = run(bench)
    row = next(row for row in found.rows if row.name == "embed_splice")
    assert row.verdict == "gains too little" and row.high < 1 and found.choice == PLAIN


def test_failing_candidates_are_left_out_and_named_with_the_reason():
    bench = Simulated({"rotary": 0.5, "layer_norm": 0.5, "swiglu": 0.5, "rms_norm": 0.9})
    bench.wrong = {"rotary": "out0: off by 1%", "layer_norm": "no answer within 60 s"}
    bench.raising = {"swiglu": "CompilationError: no"}
    found, notes = run(bench)
    reasons = {row.name: row.why for row in found.rows if row.verdict == LEFT_OUT}
    assert reasons == {**bench.wrong, **bench.raising} and found.choice.kernels == ("rms_norm",)
    assert not {"rotary", "layer_norm"} & set(bench.timed)
    # What is being timed is noted before, so that its death would be known.
    measuring = [note.measuring for note in notes]
    assert {"swiglu", TOGETHER} <= set(measuring) and measuring[-1] == ""


def test_clocks_that_never_settle_are_no_fault_of_the_candidate():
    class Unsteady(Simulated):
        def compare(self, base: Choice, choice: Choice, part: str, level: float) -> Comparison:
            raise Unsettled("the clock changed within 40 of 40 pairs")

    found, _ = run(Unsteady({"rotary": 0.5}))
    assert {row.verdict for row in found.rows} == {NOT_MEASURED} and found.choice == PLAIN


def test_what_failed_before_is_not_tried_again():
    bench = Simulated({"rotary": 0.5})
    found, notes = run(bench, left_out={"layer_norm": "hangs", "rotary": "died of SIGSEGV"})
    # Noted before anything is timed: a measurement that dies early does not forget it.
    for rows in (notes[0].rows, found.rows):
        failed = {row.name: row.why for row in rows if row.verdict == LEFT_OUT}
        assert failed == {"layer_norm": "hangs", "rotary": "died of SIGSEGV"}
    assert [row.name for row in found.rows].count("rotary") == 1
    assert "rotary" not in bench.gated and found.choice == PLAIN


def test_a_spent_budget_keeps_the_best_so_far():
    speeds = {"document_attention": 0.9, "image_attention": 0.8, "layer_norm": 0.5}
    whole, _ = run(Simulated(speeds))
    took = Simulated(speeds)
    run(took)
    found, _ = run(Simulated(speeds), budget=0.2 * took.time)
    assert 0 < len(found.choice.kernels) < len(whole.choice.kernels) and found.done
    assert found.choice.kernels[0] == "document_attention"
    missing = [row for row in found.rows if row.verdict == NOT_MEASURED]
    assert missing[0].why == "the time was spent" and missing[-1].name == "all that was taken"


def test_a_candidate_that_needs_minutes_is_not_begun_without_them():
    found, _ = run(Simulated({}), budget=200.0)
    row = next(row for row in found.rows if row.name == "max_autotune")
    assert row.verdict == NOT_MEASURED and row.why.endswith("s left")


def test_candidates_leave_the_time_for_the_whole_step():
    """What fills the time is not the last candidates but the comparison that shows the gain."""
    speeds = {"document_attention": 0.9, "image_attention": 0.8, "layer_norm": 0.5}
    took = Simulated(speeds)
    run(took)

    def measured(whole: float, kept: float) -> tuple[Found, float]:
        bench = Simulated(speeds)
        bench.whole = whole
        budget = 0.5 * took.time + 400.0
        found, _ = run(bench, budget, kept=kept)
        return found, budget - bench.time

    found, left = measured(whole=400.0, kept=400.0)
    assert -30.0 < left < 0.0, "it may take about as long as the last candidate more"
    rows = {row.name: row for row in found.rows}
    assert rows["all that was taken"].verdict == TAKEN
    assert rows["document_attention"].verdict == TAKEN
    assert "s left, kept for the whole step" in rows["CUDA graphs"].why
    # What needs more than may be kept takes nothing from the candidates.
    for kept in (0.0, 899.0):
        found, left = measured(whole=900.0, kept=kept)
        rows = {row.name: row for row in found.rows}
        assert rows["CUDA graphs"].verdict == "same" and left > 0
        assert rows["all that was taken"].verdict == NOT_MEASURED
        assert rows["all that was taken"].why.endswith("s left of about 900 s")


def test_a_choice_that_loses_in_the_whole_step_is_not_kept():
    class LosesTogether(Simulated):
        def seconds(self, choice: Choice, part: str) -> float:
            worse = part == WHOLE and choice.kernels
            return super().seconds(choice, part) * (1.5 if worse else 1.0)

    found, _ = run(LosesTogether({"rms_norm": 0.9}))
    assert found.choice == PLAIN and found.rows[-1].verdict == "slower"


def test_equal_candidates_rarely_switch():
    switched = sum(run(Simulated({}, 0.03, seed))[0].choice != PLAIN for seed in range(200))
    assert switched <= 10
    # With the level of a single comparison it would be many more, so the test can fail.
    loose = 0
    for seed in range(50):
        bench = Simulated({}, 0.03, seed)
        compared = [bench.compare(PLAIN, PLAIN, "vision", 0.9) for _ in range(12)]
        loose += any(each.faster for each in compared)
    assert loose > 10


def test_pairs_at_other_clocks_are_thrown_away():
    clocks = [1000.0, 1000.0 * (1 + 2 * CLOCKS_APART)]

    def at(seconds: float, clock: float) -> Reading:
        return Reading(seconds * 1000.0 / clock, clock)

    rng = random.Random(0)
    base = [at(1.0, clocks[rng.random() < 0.3]) for _ in range(60)]
    other = [at(1.0, clocks[rng.random() < 0.3]) for _ in range(60)]
    found = compare(iter(base).__next__, iter(other).__next__, 0.99)
    assert found.pairs < 40 and (found.low, found.ratio, found.high) == (1.0, 1.0, 1.0)
    with pytest.raises(Unsettled, match="the clock changed within 40 of 40 pairs"):
        compare(lambda: at(1.0, clocks[0]), lambda: at(1.0, clocks[1]), 0.99)


def test_too_few_pairs_prove_nothing():
    level = level_for(15)
    least = least_pairs(level)
    ratios = [0.5] * least
    assert 2 * 0.5**least <= 1 - level < 2 * 0.5 ** (least - 1)
    assert interval(ratios, level) == (0.5, 0.5)
    read = [Reading(1.0), Reading(0.5)]
    few = compare(lambda: read[0], lambda: read[1], level, pairs=least - 1)
    enough = compare(lambda: read[0], lambda: read[1], level, pairs=least)
    assert not few.faster and enough.faster


def test_a_hopeless_candidate_is_not_timed_to_the_end():
    calls = []

    def slow() -> Reading:
        calls.append(1)
        return Reading(2.0)

    found = compare(lambda: Reading(1.0), slow, 0.99)
    assert found.slower and found.pairs == 5 and len(calls) == 7
    # What is only a little slower, or not always, is timed like all others.
    assert compare(lambda: Reading(1.0), lambda: Reading(1.1), 0.99).pairs == 40


def test_a_cpu_has_its_own_candidates():
    free = frozenset({"threads", "waiting", "workers", "compile"})
    names = [candidate.name for candidate in cpu_candidates(free, cores=2)]
    assert names[0] == "1 threads" and "0 workers" in names and names[-1] == "compiled"
    assert "2 workers" not in names and "2 workers" in [c.name for c in cpu_candidates(free, 4)]
    settings = cpu_candidates(frozenset({"waiting"}), cores=2)
    assert [c.name for c in settings] == ["waiting passive", "waiting long"]
    environment = settings[0].apply(Choice(threads=2)).environment()
    assert environment == {
        "GOMP_SPINCOUNT": None,
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": "2",
    }


def test_a_candidate_without_an_effect_is_not_tried():
    bench = Simulated({})
    same = Candidate("attention auto", "language", (("attention", "auto"),))
    found = search(PLAIN, [same], bench, Limits(lambda: 0.0, 1.0))
    assert not found.rows and found.done
