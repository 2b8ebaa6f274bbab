"""The comparison of two result files.

It finds what became slower and does not report noise. It does not compare results of different
kinds.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

from bench import compare
from bench.harness.timing import summary


def row(scale: float, seed: int) -> dict:
    rng = random.Random(seed)
    seconds = [scale * (1 + 0.03 * rng.random()) for _ in range(20)]
    return {**summary(seconds), "seconds": seconds}


@pytest.fixture
def result() -> dict:
    facts = dict(
        schema=1, suite="train_step", device="CPU", date="d", commit="abcdef1", command="c"
    )
    facts |= dict(python="3", torch="2", preset="tiny")
    return {
        **facts,
        "variants": {name: row(1.0, i) for i, name in enumerate(("packed", "reference", "other"))},
    }


@pytest.fixture
def run(tmp_path: Path, capsys):
    """(exit code, output, error) of comparing two results."""

    def call(a: dict, b: dict, *options: str) -> tuple[int, str, str]:
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for file, value in zip(files, (a, b), strict=True):
            file.write_text(json.dumps(value))
        code = compare.main([*map(str, files), *options])
        return code, *capsys.readouterr()

    return call


def test_another_way_to_wait_is_named(result, run):
    spins = result | {"openmp": {"GOMP_SPINCOUNT": "10000"}}
    code, printed, _ = run(result, spins)
    assert code == 0
    assert "threads wait differently: A does not say how, B GOMP_SPINCOUNT=10000" in printed
    _, printed, _ = run(result | {"openmp": {}}, spins)
    assert "A as by default, B GOMP" in printed
    _, printed, _ = run(spins, spins)
    assert "wait" not in printed


def test_noise_is_the_same_and_a_regression_is_found(result, run):
    again = {
        **result,
        "variants": {name: row(1.0, i) for i, name in enumerate(result["variants"], start=10)},
    }
    code, printed, _ = run(result, again)
    assert code == 0 and printed.count(" same") == 3 and "slower" not in printed
    again["variants"]["packed"], again["variants"]["other"] = row(1.1, 20), row(0.5, 21)
    code, printed, error = run(result, again)
    assert code == 1 and "packed" in error and "reference" not in error
    lines = [line.split() for line in printed.splitlines()]
    assert (
        lines[3][0] == "packed"
        and "slower," in lines[3]
        and "2.01x (1.97-2.04)" in printed
        and printed.count("faster") == 1
    )
    code, printed, _ = run(result, again, "--threshold", "0.2")
    assert code == 0 and "slower\n" in printed


def test_what_the_self_check_found_is_noise_too(result, run):
    slower = {
        **result,
        "variants": {**result["variants"], "packed": {**row(1.1, 20), "noise": 0.15}},
    }
    assert run(result, slower)[0] == 0


def test_a_variant_that_fails_now_is_a_regression_and_one_left_out_is_not(result, run):
    failed = copy.deepcopy(result)
    failed["variants"]["packed"] = {"error": "error 1e-1, allowed 1e-5"}
    code, printed, error = run(result, failed)
    assert code == 1 and "failed in B: error 1e-1" in printed and "packed" in error
    del failed["variants"]["packed"]
    code, printed, _ = run(result, failed)
    assert code == 0 and "not in B" in printed


def test_rows_without_all_their_times_are_compared_by_quartiles(result, run):
    bare = {"median": 1.0, "lower_quartile": 0.9, "upper_quartile": 1.1}
    slower = {name: 1.3 * value for name, value in bare.items()}
    assert run({**result, "variants": {"x": bare}}, {**result, "variants": {"x": slower}})[0] == 1
    assert (
        run(
            {**result, "variants": {"x": bare}},
            {**result, "variants": {"x": {**bare, "median": 1.08}}},
        )[0]
        == 0
    )


def test_other_sizes_inside_a_file_are_not_compared(result, run):
    def kernels(rows: int) -> dict:
        one = {"sizes": {"m": rows}, "providers": {"ours": {"forward": row(rows, 1)}}}
        same = {"sizes": {"m": 1}, "providers": {"ours": {"forward": row(1.0, 2)}}}
        return {**result, "variants": {}, "kernels": {"rms_norm": one, "swiglu": same}}

    code, printed, _ = run(kernels(1), kernels(2))
    assert code == 0 and "rms_norm.ours.forward" in printed and "of other sizes in B" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "kernels"}, "different suites: train_step and kernels"),
        ({"device": "GPU"}, "different devices: CPU and GPU"),
        ({"schema": 2}, "schema 2"),
        ({"preset": "nanovlm-222m"}, "preset is tiny and nanovlm-222m"),
        ({"commit": "unknown"}, "no commit"),
        ({"variants": {}}, "no measurement in common"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(result, run, change, message):
    code, printed, error = run(result, {**result, **change})
    assert code == 2 and not printed and message in error and error.count("\n") == 1


def test_any_device_forces_it(result, run):
    assert run(result, {**result, "device": "GPU"}, "--any-device")[0] == 0


def test_peaks_are_compared_by_the_threshold_alone(result, run):
    del result["variants"]
    a = {
        **result,
        "suite": "memory",
        "peaks": {"none": {"1": {"peak_mib": 100.0}, "4": {"peak_mib": 400.0}}},
    }
    b = copy.deepcopy(a)
    b["peaks"]["none"]["1"]["peak_mib"], b["peaks"]["none"]["4"]["peak_mib"] = 104.0, 300.0
    code, printed, _ = run(a, b)
    assert (
        code == 0
        and "more, single reading" in printed
        and "less, single reading" in printed
        and "MiB" in printed
    )
    code, _, error = run(a, b, "--threshold", "0.03")
    assert code == 1 and "peaks.none.1" in error and "peaks.none.4" not in error
    b["peaks"]["none"]["4"] = {"error": "out of memory"}
    code, printed, error = run(a, b)
    assert code == 1 and "failed in B: out of memory" in printed and "peaks.none.4" in error


def test_rates_of_the_loader_are_compared_by_their_intervals_and_those_of_stages_by_the_threshold(
    result, run
):
    del result["variants"]
    loader = {"prepared": {"0": [100.0, 110.0, 120.0], "1": [100.0, 101.0, 102.0]}}
    a = {
        **result,
        "suite": "dataloader",
        "image_size": 224,
        "stages": {"read": 1000.0, "pack": 10.0},
        "loader": loader,
    }
    b = copy.deepcopy(a)
    b["loader"]["prepared"] = {"0": [95.0, 102.0, 111.0], "1": [80.0, 81.0, 82.0]}
    b["stages"] = {"read": 900.0, "pack": 20.0}
    code, printed, error = run(a, b)
    assert (
        code == 1
        and "loader.prepared.1" in error
        and "stages.read" in error
        and "samples/s" in printed
    )
    assert (
        not {"loader.prepared.0", "stages.pack"} & set(error.replace(",", "").split())
        and "same (" in printed
    )
    assert run(a, {**b, "image_size": 512})[0] == 2


def test_a_file_without_anything_to_compare_says_so(result, run):
    code, _, error = run({**result, "variants": {}}, {**result, "variants": {}})
    assert code == 2 and "holds no times, peaks or rates" in error


def test_no_file_and_no_json(tmp_path, result, capsys):
    file = tmp_path / "a.json"
    file.write_text("{")
    assert compare.main([str(file), str(file)]) == 2 and "not JSON" in capsys.readouterr().err
    assert (
        compare.main([str(tmp_path / "b.json"), str(file)]) == 2
        and "b.json" in capsys.readouterr().err
    )
