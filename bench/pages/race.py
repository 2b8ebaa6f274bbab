"""What a result of bench.race says: speed-ups, the table of bench/README.md, and a few words."""

from __future__ import annotations

from bench.harness.tables import Rows

SIDES = ("fast", "reference")  # the fast one first: its result is there when time runs out


def speedups(sides: dict[str, dict]) -> dict[str, float]:
    """How many times as fast ours is: to the target if both reached it, and per step.

    The steps are compared up to the last one that both recorded; they are on the same batches.
    `at_least` is a lower bound for when only ours reached the target and the reference has trained
    for longer.
    """
    found: dict[str, float] = {}
    if not all(side in sides for side in SIDES):
        return found
    fast, reference = (sides[side] for side in SIDES)
    if fast["reached"] and reference["reached"]:
        found["speedup"] = reference["reached"]["seconds"] / fast["reached"]["seconds"]
    elif fast["reached"] and reference["seconds"] > fast["reached"]["seconds"]:
        found["at_least"] = reference["seconds"] / fast["reached"]["seconds"]
    fast_seconds = {point["step"]: point["seconds"] for point in fast["points"]}
    reference_seconds = {point["step"]: point["seconds"] for point in reference["points"]}
    if common := fast_seconds.keys() & reference_seconds.keys():
        last = max(common)
        ratio = reference_seconds[last] / fast_seconds[last]
        found |= {"same_steps": last, "same_steps_times": ratio}
    return found


NAMES = {"fast": "ours", "reference": "padded reference (nanoVLM v0.1)"}


def race_rows(result: dict) -> Rows:
    """The table of bench/README.md."""
    head = (f"to {result['target']:.0%} of the test split", "seconds of training", "steps")
    rows: Rows = [(*head, "questions seen", "questions/s", "best accuracy on the images asked")]
    for name, side in result["sides"].items():
        end = side["reached"] or {"seconds": side["seconds"], "questions": side["questions"]}
        steps = f"{side['points'][-1]['step']:,}" if side["points"] else "-"
        best = max((point["accuracy"] for point in side["points"]), default=0.0)
        seconds = f"not reached in {end['seconds']:,.0f}"
        if side["reached"]:
            seconds = f"**{end['seconds']:,.1f}**"
        rate = f"{end['questions'] / max(end['seconds'], 1e-9):,.0f}"
        rows.append((NAMES[name], seconds, steps, f"{end['questions']:,}", rate, f"{best:.1%}"))
    for name in NAMES.keys() - result["sides"].keys():
        rows.append((NAMES[name], "not measured yet", *["-"] * 4))
    return rows


def outcome(result: dict) -> str:
    """The result in a few words, for a line of the README."""
    sides = result["sides"]

    def seconds(side: str) -> str:
        if side not in sides:
            return "not measured yet"
        if reached := sides[side]["reached"]:
            return f"{reached['seconds']:,.0f} s"
        return f"not reached in {sides[side]['seconds']:,.0f} s"

    gain = f"**{result['speedup']:.1f}x**: " if "speedup" in result else ""
    gain = gain or (f"**over {result['at_least']:.1f}x**: " if "at_least" in result else "")
    return f"{gain}{seconds('fast')} against {seconds('reference')} of training"
