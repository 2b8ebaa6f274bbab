"""The race between the two sides, fast and reference.

Both sides learn alike, and the clock counts training only. A target that was not reached is not
reported as reached.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import race, report
from bench.pages import sections
from bench.pages.race import outcome, race_rows, speedups
from bench.subjects.race_sides import padded_rows
from nanovlm_fast.packing.batch import pack, pad
from nanovlm_fast.packing.packer import Budget
from tests.support.samples import random_sample


def run(out: Path, *options: str) -> int:
    return race.main(
        ["--quick", "--device", "cpu", "--out", str(out), "--state", str(out / "state"), *options]
    )


def result_in(out: Path) -> dict:
    (file,) = out.glob("*/race.json")
    return json.loads(file.read_text())


def test_rows_unpacked_on_the_device_are_the_padded_rows(small_config):
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, small_config, 1, documents) for documents in (3, 1, 2)]
    tokens = sum(sample.tokens for sample in samples)
    batch = pack(
        samples,
        Budget(tokens + 50, 20, 5, 200, 64),
        small_config.image_tokens,
        small_config.vit_img_size,
    )
    wanted = pad(samples, 25)
    pixels = (
        wanted.images.squeeze(1).float() / 255 - small_config.image_mean
    ) / small_config.image_std
    for cut in (batch, batch.trimmed()):
        ids, images, mask, targets = padded_rows(cut, small_config, 25)
        assert torch.equal(ids, wanted.input_ids) and torch.equal(mask, wanted.attention_mask)
        assert torch.equal(targets, wanted.targets)
        torch.testing.assert_close(images, pixels)


def test_both_sides_take_the_same_steps_and_neither_is_said_to_have_arrived(tmp_path, capsys):
    assert run(tmp_path) == 0
    result = result_in(tmp_path)
    fast, reference = (result["sides"][side] for side in race.SIDES)
    for side in (fast, reference):
        assert [point["step"] for point in side["points"]] == [2, 4] and side["ended"] == "schedule"
        seconds = [point["seconds"] for point in side["points"]]
        assert 0 < seconds[0] < seconds[1] == side["seconds"] and side["reached"] is None
    for ours, theirs in zip(fast["points"], reference["points"], strict=True):
        assert (
            ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            and ours["questions"] == theirs["questions"]
        )
        assert ours["asked"] == theirs["asked"] > 0
    assert fast["points"][1]["loss"] < fast["points"][0]["loss"]
    assert (
        "speedup" not in result
        and "at_least" not in result
        and result["same_steps"] == 4
        and result["small"]
    )
    printed = capsys.readouterr().out
    assert printed.count("not reached in ") == 4 and "%" in printed
    for theme in ("light", "dark"):
        assert Image.open(next(tmp_path.glob(f"*/race_{theme}.png"))).size[0] > 900


def test_a_side_alone_leaves_the_other_and_a_race_of_other_settings_does_not(tmp_path):
    assert run(tmp_path, "--only", "fast") == 0
    assert (
        "not measured yet" in str(race_rows(result_in(tmp_path)))
        and speedups(result_in(tmp_path)["sides"]) == {}
    )
    before = result_in(tmp_path)["sides"]["fast"]
    assert run(tmp_path, "--only", "reference") == 0
    assert result_in(tmp_path)["sides"].keys() == {"fast", "reference"}
    assert result_in(tmp_path)["sides"]["fast"] == before
    assert run(tmp_path, "--only", "fast", "--", "--seed", "1") == 0
    assert result_in(tmp_path)["sides"].keys() == {"fast"}


def test_a_side_that_was_cut_off_goes_on_to_the_same_end(tmp_path, monkeypatch):
    """The side is stopped by its budget after the first step, and then once more.

    Its losses and answers are those of a single call.
    """
    assert run(tmp_path / "whole", "--only", "fast", "--", "--eval-every", "1") == 0
    whole = result_in(tmp_path / "whole")["sides"]["fast"]
    cut = tmp_path / "cut"
    assert run(cut, "--only", "fast", "--budget-s", "1e-6", "--", "--eval-every", "1") == 0
    first = result_in(cut)["sides"]["fast"]
    assert first["ended"] == "budget" and [point["step"] for point in first["points"]] == [1]
    assert (cut / "state" / "race_fast.pt").exists()
    assert run(cut, "--only", "fast", "--budget-s", "1e-6", "--", "--eval-every", "1") == 0
    assert result_in(cut)["sides"]["fast"] == first, "its budget was spent"
    assert run(cut, "--only", "fast", "--", "--eval-every", "1") == 0
    there = result_in(cut)["sides"]["fast"]
    assert (
        there["calls"] == 2
        and there["ended"] == "schedule"
        and there["points"][0] == first["points"][0]
    )
    assert [p["loss"] for p in there["points"]] == [p["loss"] for p in whole["points"]]
    assert there["seconds"] > first["seconds"] and not (cut / "state" / "race_fast.pt").exists()
    monkeypatch.setattr(race, "SHORTEST", 0.0)
    assert (
        run(cut, "--again", "--wall-s", "1e-6", "--only", "fast", "--", "--eval-every", "1") == 0
    )  # it gets no time
    assert result_in(cut)["sides"]["fast"]["ended"] == "schedule"


def test_a_call_that_runs_out_of_time_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(race, "SHORTEST", 0.0)
    assert run(tmp_path, "--wall-s", "1e-6") == race.UNFINISHED and not list(
        tmp_path.glob("*/race.json")
    )
    assert capsys.readouterr().out.count("no time left") == 2


def test_the_target_counts_when_the_whole_split_confirms_it(tmp_path):
    """A target that the pictures asked may pass by luck, and the whole split of 64 may not."""
    assert run(tmp_path, "--target", "1e-9", "--", "--max-steps", "30", "--eval-every", "5") == 0
    for side in result_in(tmp_path)["sides"].values():
        if side["reached"]:
            assert (
                side["reached"]["whole"] > 0
                and side["reached"]["asked_whole"] > side["reached"]["asked"]
            )
            assert side["ended"] == "reached" and side["points"][-1] == side["reached"]
        for point in side["points"]:
            assert ("whole" in point) == (point["accuracy"] > 0)


def made_up(fast: float | None, reference: float | None) -> dict:
    """A result with two evaluations for each side, at steps 10 and 20.

    `fast` and `reference` are the seconds after which each side reached the target, or None.
    """
    sides = {}
    for name, reached, scale in (("fast", fast, 1.0), ("reference", reference, 5.0)):
        points = [
            {"step": s, "seconds": scale * s, "questions": 9 * s, "accuracy": s / 40, "loss": 1.0}
            for s in (10, 20)
        ]
        at = reached and {**points[-1], "seconds": reached}
        sides[name] = {
            "points": points,
            "seconds": scale * 20,
            "questions": 180,
            "reached": at,
            "ended": "budget",
        }
    facts = dict(
        device="NVIDIA X",
        date="2026-01-02T",
        commit="abcdef123",
        command="c",
        torch="2",
        python="3",
    )
    facts |= dict(driver="1", triton="3", preset="nanovlm-222m", data="easy_vqa", target=0.95)
    return {**facts, "sides": sides, **speedups(sides)}


def test_a_speedup_needs_both_at_the_target():
    assert speedups(made_up(20.0, 90.0)["sides"]) == {
        "speedup": 4.5,
        "same_steps": 20,
        "same_steps_times": 5.0,
    }
    both = made_up(20.0, 90.0)
    assert outcome(both) == "**4.5x**: 20 s against 90 s of training"
    bound = made_up(20.0, None)
    assert "speedup" not in bound and bound["at_least"] == 5.0
    assert outcome(bound) == "**over 5.0x**: 20 s against not reached in 100 s of training"
    neither = made_up(None, None)
    assert not {"speedup", "at_least"} & neither.keys() and "x" not in outcome(neither)
    assert [row[1] for row in race_rows(bound)] == [
        "seconds of training",
        "**20.0**",
        "not reached in 100",
    ]
    alone = copy.deepcopy(both)
    del alone["sides"]["reference"]
    assert speedups(alone["sides"]) == {} and race_rows(alone)[-1][1] == "not measured yet"


def test_the_report_has_the_race_or_says_that_there_is_none(tmp_path):
    (tmp_path / "x").mkdir()
    assert "### race" in sections.suites_page(
        tmp_path
    ) and "Not measured yet." in sections.suites_page(tmp_path)
    (tmp_path / "x" / "race_nanovlm-222m.json").write_text(json.dumps(made_up(20.0, 90.0)))
    page, table = sections.suites_page(tmp_path), report.overview(tmp_path)
    assert (
        "Not measured yet." not in page
        and "| ours | **20.0** | 20 |" in page
        and "race_nanovlm-222m_dark.png" in page
    )
    assert "`nanovlm-222m` from scratch to 95%" in table and "**4.5x**" in table


def test_the_recipe_of_the_222m_model_is_one_that_train_py_takes():
    args = race.parse(["--preset", "nanovlm-222m"])
    config, train = race.configs(args)
    assert (config.vit_img_size, config.vit_n_blocks, config.lm_n_blocks, config.lm_vocab_size) == (
        224,
        12,
        30,
        49152,
    )
    assert not (train.vision or train.language or train.eval) and train.turns == "independent"
    assert train.compile == "default" and train.curriculum == "what shape", (
        "the preset's, and the data set's recipe"
    )
    assert train.lr_vision * train.muon_scale == pytest.approx(0.02)
    assert race.embedding_std(config) * config.lm_hidden_dim == pytest.approx(6.4), (
        "a token's own logit, as in tiny"
    )
    assert race.embedding_std(race.configs(race.parse([]))[0]) is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--target", "1.5"), "--target: must be a finite number above 0 and up to 1"),
        (("--data", "mmstar"), "--data easy_vqa or synthetic"),
        (("--", "--max-steps", "0"), "--max-steps"),
        (("--", "--turns", "chat"), "--turns independent"),
        (("--", "--dtype", "float16"), "--dtype float16: neither side of the race scales"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, error):
    assert run(tmp_path, *options) in (1, 2)
    message = capsys.readouterr().err
    assert message.startswith("error: ") and error in message and message.count("\n") == 1


def test_a_loss_that_is_not_finite_ends_the_side_and_not_the_other(tmp_path, capsys, monkeypatch):
    step = race.Fast.backward
    monkeypatch.setattr(race.Fast, "backward", lambda self, batch: step(self, batch) * float("nan"))
    assert run(tmp_path) == 1
    sides = result_in(tmp_path)["sides"]
    assert (
        "nan" in sides["fast"]["ended"]
        and not sides["fast"]["points"]
        and sides["reference"]["points"]
    )
    assert "error: fast: " in capsys.readouterr().err
