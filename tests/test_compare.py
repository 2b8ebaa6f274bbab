"""Two result files: what got slower is found, noise is not taken for it, and what differs in kind is not compared."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

from bench import compare
from bench.timing import summary


def row(scale: float, seed: int) -> dict:
    rng = random.Random(seed)
    seconds = [scale * (1 + 0.03 * rng.random()) for _ in range(20)]
    return {**summary(seconds), "seconds": seconds}


@pytest.fixture
def result() -> dict:
    facts = dict(schema=1, suite="train_step", device="CPU", date="d", commit="abcdef1", command="c")
    facts |= dict(python="3", torch="2", preset="tiny")
    return {**facts, "variants": {name: row(1.0, i) for i, name in enumerate(("packed", "reference", "other"))}}


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


def test_noise_is_the_same_and_a_regression_is_found(result, run):
    again = {**result, "variants": {name: row(1.0, i) for i, name in enumerate(result["variants"], start=10)}}
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
    slower = {**result, "variants": {**result["variants"], "packed": {**row(1.1, 20), "noise": 0.15}}}
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
    assert run({**result, "variants": {"x": bare}}, {**result, "variants": {"x": {**bare, "median": 1.08}}})[0] == 0


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


def test_no_file_and_no_json(tmp_path, result, capsys):
    file = tmp_path / "a.json"
    file.write_text("{")
    assert compare.main([str(file), str(file)]) == 2 and "no JSON" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "b.json"), str(file)]) == 2 and "b.json" in capsys.readouterr().err
