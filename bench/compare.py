"""What got better or worse between two result files, beyond the noise: times, memory, loader rates.

    python -m bench.compare before.json after.json
    python -m bench.compare before.json after.json --threshold 0.02    2% more is a regression

Exit code 0: no value of A is worse in B by more than the threshold and the noise. 1: one is, or has
no value in B because it failed. 2: the files cannot be compared: they differ in suite, work, device
or schema, or have nothing in common. A value that was read once (a peak, the rate of a stage) has
no noise estimate and is compared with the threshold alone.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.results import load, measurements
from bench.harness.tables import Rows, lined_up
from bench.harness.timing import Difference, difference
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.ranges import Range

# What a time depends on: where these differ, times must not be compared.
SETTINGS = (
    "preset",
    "layers",
    "data",
    "samples",
    "work",
    "sizes",
    "dtype",
    "small",
    "options",
    "image_size",
)
NOT_THERE = "not in B"
COUNTED = ("MiB", "GB", "launches")  # the others are times and rates
LESS_IS_BETTER = (*COUNTED, "ms")


@dataclass(frozen=True)
class Row:
    """`gain`: how many times as good B is as A; None if B has no value, for the reason `why`."""

    name: str
    unit: str
    before: float
    after: float | None
    gain: Difference | None
    why: str = ""

    @property
    def worse_by(self) -> float:
        """Share of time or memory that B takes more, beyond the noise; infinite if it failed."""
        if self.gain is None:
            return float("inf") if self.why.startswith("failed") else 0.0
        # The ratio of the medians, but only where the interval excludes that nothing changed.
        return 0.0 if self.gain.same else 1 / self.gain.ratio - 1


def checked(before: Path, after: Path, any_device: bool) -> tuple[dict, dict]:
    """Load both files.

    Raises OSError, or ValueError if they are not results of the same suite, work and device.
    """
    a = load(before)
    b = load(after)
    # Older files do not name their suite, so they are only compared by what they measured.
    suites = [result["suite"] for result in (a, b) if "suite" in result]
    if len(set(suites)) > 1:
        raise ValueError(f"they are results of different suites: {suites[0]} and {suites[1]}")
    if a["device"] != b["device"] and not any_device:
        raise ValueError(
            f"different devices: {a['device']} and {b['device']} "
            "(--any-device compares all the same)"
        )
    for name in SETTINGS:
        if a.get(name) != b.get(name):
            raise ValueError(
                f"they measured different things: {name} is {a.get(name)} and {b.get(name)}"
            )
    return a, b


def settings(result: dict, path: tuple[str, ...]) -> list[Any]:
    """The settings of the measurement at `path`, collected from everything that encloses it."""
    found: list[Any] = []
    for part in path:
        result = result[part]
        found.append({name: result[name] for name in SETTINGS if name in result})
    return found


def at(result: dict, path: tuple[str, ...]) -> dict:
    """The entry at the path; {} if there is none, {'error': why} if what encloses it failed."""
    for part in path:
        if "error" in result:
            return {"error": result["error"]}
        result = result.get(part) or {}
        if not isinstance(result, dict):
            return {}
    return result


def speed(before: dict, after: dict) -> Difference:
    """How many times as fast `after` is: from all times if both rows have them, else quartiles.

    A row with a median alone counts as exact.
    """
    noise = before.get("noise", 0.0) + after.get("noise", 0.0)
    if "seconds" in before and "seconds" in after:
        return difference(after["seconds"], before["seconds"], noise)
    a_low, a_high = _quartiles(before)
    b_low, b_high = _quartiles(after)
    ratio = before["median"] / after["median"]
    return Difference(ratio, a_low / b_high / (1 + noise), a_high / b_low * (1 + noise))


def _quartiles(row: dict) -> tuple[float, float]:
    return row.get("lower_quartile", row["median"]), row.get("upper_quartile", row["median"])


def readings(result: dict) -> Iterator[tuple[tuple[str, ...], str, list[float]]]:
    """(path, unit, values) of what was not timed.

    They are the peaks of bench.memory, the rates of bench.dataloader, and what bench.compiled_step
    counted and predicted.
    """
    if result.get("suite") == "compiled_step":
        for label, row in result["variants"].items():
            yield ("variants", label, "launches"), "launches", [row["launches"]]
            yield ("variants", label, "moved"), "GB", [row["read_gb"] + row["written_gb"]]
            yield ("variants", label, "floor"), "ms", [row["floor_ms"]]
            yield ("variants", label, "predicted"), "ms", [row["expected_ms"]]
    for name, row in result.get("peaks", {}).items():
        for samples, found in row.items():
            if "peak_mib" in found:
                yield ("peaks", name, samples), "MiB", [found["peak_mib"]]
    for stage, rate in result.get("stages", {}).items():
        yield ("stages", stage), "samples/s", [rate]
    for way, rates in result.get("loader", {}).items():
        for workers, each in rates.items():
            yield ("loader", way, workers), "samples/s", each


def compare_readings(a: dict, b: dict) -> Iterator[Row]:
    there = {path: values for path, _, values in readings(b)}
    for path, unit, before in readings(a):
        after = there.get(path)
        name = ".".join(part for part in path if part != "variants")
        if after is None:
            error = at(b, path).get("error")
            why = f"failed in B: {error}" if error else NOT_THERE
            yield Row(name, unit, statistics.median(before), None, None, why)
            continue
        # `difference` compares times, of which less is better; rates go in the other way round.
        less, more = (after, before) if unit in LESS_IS_BETTER else (before, after)
        gain = difference(less, more)
        why = ""
        if len(before) == len(after) == 1:
            gain = Difference(gain.ratio, gain.ratio, gain.ratio)
            why = "single reading"
        yield Row(name, unit, statistics.median(before), statistics.median(after), gain, why)


def compare(a: dict, b: dict) -> list[Row]:
    """A row for each value of A, the largest losses first."""
    rows = list(compare_readings(a, b))
    for path, before in measurements(a):
        after = at(b, path)
        # These levels of the file carry no information for a reader of the table.
        name = ".".join(part for part in path if part not in ("variants", "kernels", "providers"))
        if "median" not in after:
            why = f"failed in B: {after['error']}" if "error" in after else NOT_THERE
            rows.append(Row(name, "ms", before["median"] * 1e3, None, None, why))
        elif settings(a, path) != settings(b, path):
            rows.append(Row(name, "ms", before["median"] * 1e3, None, None, "of other sizes in B"))
        else:
            times = before["median"] * 1e3, after["median"] * 1e3
            rows.append(Row(name, "ms", *times, speed(before, after)))
    return sorted(rows, key=lambda row: (-row.worse_by, row.gain.ratio if row.gain else 0.0))


def table(rows: list[Row], threshold: float) -> str:
    lines: Rows = [("measurement", "A", "B", "unit", "gain of B (interval)", "what it means")]
    for row in rows:
        if row.gain is None:
            lines.append((row.name, f"{row.before:,.3f}", "-", row.unit, "-", row.why))
            continue
        better, worse = ("less", "more") if row.unit in COUNTED else ("faster", "slower")
        meaning = "" if row.gain.same else better if row.gain.ratio > 1 else worse
        meaning += f", more than {threshold:.0%}" if row.worse_by > threshold else ""
        meaning = ", ".join(filter(None, (meaning, row.why)))
        gain = f"{row.gain.ratio:.2f}x" if row.gain.low == row.gain.high else str(row.gain)
        values = (f"{row.before:,.3f}", f"{row.after:,.3f}", row.unit)
        lines.append((row.name, *values, gain, meaning))
    return lined_up(lines, left=(0, 3, 4, 5))


def waiting(result: dict) -> str:
    """How the result's threads waited for each other, in words."""
    if "openmp" not in result:  # older files, and those of a GPU
        return "does not say how"
    settings = " ".join(f"{name}={value}" for name, value in result["openmp"].items())
    return settings or "as by default"


def make_parser() -> Parser:
    parser = Parser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold",
        type=Range(float),
        default=0.05,
        help="share of more time or memory that counts as a regression",
    )
    parser.add_argument(
        "--any-device", action="store_true", help="compare results of different devices"
    )
    return parser


@reports_errors(code=2)
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    a, b = checked(args.before, args.after, args.any_device)
    rows = compare(a, b)
    if not rows:
        raise ValueError(f"{args.before} holds no times, peaks or rates to compare")
    if all(row.why == NOT_THERE for row in rows):
        raise ValueError("they have no measurement in common")
    print(f"A: {a['commit'][:7]} of {a['date']} on {a['device']}")
    print(f"B: {b['commit'][:7]} of {b['date']} on {b['device']}")
    print(table(rows, args.threshold))
    if a.get("openmp") != b.get("openmp"):
        print(f"OpenMP's threads wait differently: A {waiting(a)}, B {waiting(b)}")
    for name, result in (("A", a), ("B", b)):
        for warning in result.get("machine", {}).get("warnings", ()):
            print(f"{name}: {warning}")
    regressions = [row.name for row in rows if row.worse_by > args.threshold]
    if regressions:
        names = ", ".join(regressions)
        print(f"error: worse by more than {args.threshold:.0%}: {names}", file=sys.stderr)
    return int(bool(regressions))


if __name__ == "__main__":
    sys.exit(main())
