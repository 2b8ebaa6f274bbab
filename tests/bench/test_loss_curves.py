"""The loss curves: both models train alike, and the yardstick tells when they do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import loss_curves
from bench.loss_curves import HALF, STREAM, TRUTH, VARIANTS, Kept, judge, smooth
from bench.pages.readme import curves_row


def run(out: Path, *options: str) -> int:
    options = ("--steps", "4", "--seeds", "2", "--tokens", "400", *options)
    return loss_curves.main(["--data", "synthetic", "--device", "cpu", "--out", str(out), *options])


def test_a_short_run_agrees_and_writes_file_and_picture(tmp_path, capsys):
    assert run(tmp_path) == 0
    (file,) = tmp_path.glob("*/loss_curves.json")
    result = json.loads(file.read_text())
    assert {"device", "commit", "command", "torch", "date"} <= set(result) and result["passed"]
    curves = {variant: np.array(rows) for variant, rows in result["curves"].items()}
    assert tuple(curves) == VARIANTS and all(rows.shape == (2, 4) for rows in curves.values())
    np.testing.assert_allclose(curves["packed float32"], curves[TRUTH], atol=5e-5)
    # Close, but not the same computation
    for variant in ("reference bfloat16", "packed bfloat16", STREAM, HALF):
        assert 1e-5 < np.abs(curves[variant] - curves[TRUTH]).max() < 0.05
    assert np.abs(curves[TRUTH][0] - curves[TRUTH][1]).min() > 1e-3, (
        "seeds draw other weights and data"
    )
    assert (curves[TRUTH][:, -1] < curves[TRUTH][:, 0]).all()
    assert (curves[STREAM] != curves["packed bfloat16"]).any(), "the stream was not narrowed"
    assert len(result["rows"]) == 10 and capsys.readouterr().out.count("packed") == 8
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_packed_model_that_learns_something_else_fails(tmp_path, capsys, monkeypatch):
    loss = loss_curves.Training.loss
    wrong = {"packed bfloat16": 1.5}  # a loss that is wrong by half, as with a wrong mean
    monkeypatch.setattr(
        loss_curves.Training, "loss", lambda self, s: loss(self, s) * wrong.get(self.name, 1)
    )
    assert run(tmp_path) == 1 and "further from the reference" in capsys.readouterr().err
    (file,) = tmp_path.glob("*/loss_curves.json")
    result = json.loads(file.read_text())
    assert not result["passed"]
    assert {row["variant"] for row in result["rows"] if not row["passed"]} == {"packed bfloat16"}


def test_the_yardstick_is_the_spread_of_the_seeds_around_a_step(monkeypatch):
    """The curves are not smoothed, and the window is one step to each side.

    The seeds cross at the seventh step.
    """
    monkeypatch.setattr(loss_curves, "SPAN", 1)
    apart = np.array([3.0, 3.0, 3.0, 3.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    truth = np.stack([0 * apart, apart / 2, apart])
    curves = {variant: truth.copy() for variant in VARIANTS}
    curves["packed float32"][1] += [
        2.7,
        0,
        0,
        0,
        2.7,
        0,
        0.5,
        0,
        0,
    ]  # the fifth step is next to a spread of 3
    verdict = judge(curves)
    assert verdict["passed"]
    (row,) = (
        row for row in verdict["rows"] if row["variant"] == "packed float32" and row["seed"] == 1
    )
    assert (row["share"], row["at_step"], row["spread"]) == (pytest.approx(0.9), 1, 3)
    assert row["share_of_same_step"] > 1e6, "at the crossing"
    curves["packed float32"][1, 5] += (
        1.1  # less than the first spread, but more than those around the sixth step
    )
    verdict = judge(curves)
    assert not verdict["passed"] and [
        row["seed"] for row in verdict["rows"] if not row["passed"]
    ] == [1]
    curves["packed float32"] = truth.copy()
    curves["reference bfloat16"] += 100.0  # reported, but not part of our verdict
    assert judge(curves)["passed"]


def test_smoothing_keeps_a_constant_and_averages_noise():
    assert smooth(np.full((2, 30), 1.5)) == pytest.approx(1.5)
    noise = np.random.default_rng(0).normal(size=(1, 400))
    assert smooth(noise)[0, 0] == noise[0, 0] and smooth(noise)[:, 50:].std() < 0.4


def test_a_slice_and_the_variants_that_were_named(tmp_path):
    options = ("--layers", "1", "--variants", f"{STREAM},packed float32")
    assert run(tmp_path, *options) == 0
    (file,) = tmp_path.glob("*/*.json")
    result = json.loads(file.read_text())
    assert file.stem == result["suite"] == "loss_curves_1layer" and result["layers"] == 1
    assert list(result["curves"]) == [TRUTH, "packed float32", STREAM]
    assert {row["variant"] for row in result["rows"]} == {"packed float32", STREAM}
    assert file.with_suffix(".png").exists() and "cut to 1 layer per" in curves_row(result)[0]


def test_an_interrupted_run_goes_on_after_its_last_curve(tmp_path, monkeypatch):
    """The tree counts as clean, because curves of a changed one are not taken up."""
    options = ("--variants", "packed float32")
    facts = loss_curves.facts
    step = loss_curves.Training.step
    taken: list[str] = []
    stops = [True]

    def interrupted(training, *arguments):
        taken.append(training.name)
        if stops[0] and len(taken) == 10:  # in the third of four curves
            raise ValueError("no power")
        return step(training, *arguments)

    assert run(tmp_path / "whole", *options) == 0
    monkeypatch.setattr(loss_curves, "facts", lambda device: facts(device) | {"clean": True})
    monkeypatch.setattr(loss_curves.Training, "step", interrupted)
    assert run(tmp_path / "cut", *options) == 1
    (part,) = tmp_path.glob("cut/*/*")
    assert part.suffix == ".part" and len(json.loads(part.read_text())["losses"]) == 2
    stops[0] = False
    taken.clear()
    assert run(tmp_path / "cut", *options) == 0
    assert taken == [TRUTH] * 4 + ["packed float32"] * 4
    cut, whole = (
        json.loads(next(tmp_path.glob(f"{name}/*/loss_curves.json")).read_text())
        for name in ("cut", "whole")
    )
    assert cut["curves"] == whole["curves"] and cut["rows"] == whole["rows"]
    assert not part.exists()


def test_kept_curves_are_of_the_same_clean_tree_and_settings(tmp_path):
    file = tmp_path / "curves.part"
    about = dict(commit="a", clean=True, torch="2", threads=1)
    Kept(file, about, {"steps": 4}).add("a curve", [1.0])
    assert Kept(file, about, {"steps": 4}).losses == {"a curve": [1.0]}
    for other in (dict(commit="b"), dict(clean=False), dict(torch="3"), dict(threads=2)):
        assert Kept(file, about | other, {"steps": 4}).losses == {}
    assert Kept(file, about, {"steps": 5}).losses == {}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--seeds", "1"), "--seeds: must be"),
        (("--data", "no"), "no"),
        (("--layers", "-1"), "--layers: must be"),
        (("--variants", "packed int8"), "packed int8: there are reference float32, "),
        (("--variants", TRUTH), "name another one"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, error):
    assert run(tmp_path, *options) in (1, 2)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and error in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops(tmp_path, capsys, monkeypatch):
    loss = loss_curves.Training.loss
    monkeypatch.setattr(loss_curves.Training, "loss", lambda self, s: loss(self, s) * float("nan"))
    assert run(tmp_path) == 1 and f"error: {TRUTH}: the loss is nan" in capsys.readouterr().err
