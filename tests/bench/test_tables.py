"""Tables of the suites in a terminal, and command lines with options for another program."""

from __future__ import annotations

import sys

from bench.harness.options import split_options
from bench.harness.tables import Rows, line, lined_up, markdown

ROWS: Rows = [
    ("kernel", "provider", "us"),
    ("rms_norm", "ours", "1,234.5"),
    ("rms_norm", "a text that is longer than the column"),
    ("x", "compile", "7"),
]


def test_numbers_end_at_one_place_and_an_error_runs_on():
    assert lined_up(ROWS, left=(0, 1)).splitlines() == [
        "kernel    provider       us",
        "rms_norm  ours      1,234.5",
        "rms_norm  a text that is longer than the column",
        "x         compile         7",
    ]
    assert line(("a", "1", "2"), (3, 4, 1)) == "a       1  2"


def test_a_cell_does_not_end_a_column_of_markdown():
    assert markdown([("a|b", "c"), ("1", "2")]) == "| a/b | c |\n| --- | --- |\n| 1 | 2 |"


def test_options_after_the_dashes_are_handed_on(monkeypatch):
    assert split_options(["--out", "x", "--", "--lr", "1", "--"]) == (
        ["--out", "x"],
        ["--lr", "1", "--"],
    )
    assert split_options(["--out", "x"]) == (["--out", "x"], [])
    monkeypatch.setattr(sys, "argv", ["bench", "a", "--", "b"])
    assert split_options(None) == (["a"], ["b"])
