"""Folders among the options become absolute paths; everything else stays as it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from nanovlm_fast import export, generate
from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data import prepare
from nanovlm_fast.data.places import absolute_paths, without_path
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.registry import SOURCES
from nanovlm_fast.runs import save_run_config


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """A folder that holds a data set `data`.

    Beside it is the home folder, with an empty `data`.
    """
    (tmp_path / "here" / "data").mkdir(parents=True)
    (tmp_path / "here" / "data" / "train.jsonl").write_text("{}\n")
    (tmp_path / "home" / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("jsonl:data", "jsonl:HERE/here/data"),
        ("prepared:../here/data", "prepared:HERE/here/data"),
        ("data", "HERE/here/data"),
        ("data:a,b", "HERE/here/data:a,b"),
        ("mmstar:data", "mmstar:HERE/here/data"),
        ("jsonl:~/data", "jsonl:HERE/home/data"),
        ("~/data:a", "HERE/home/data:a"),
        ("easy_vqa", "easy_vqa"),
        ("mmstar", "mmstar"),
        ("synthetic:32", "synthetic:32"),
        ("OWNER/NAME", "OWNER/NAME"),
        ("HuggingFaceM4/the_cauldron:all45", "HuggingFaceM4/the_cauldron:all45"),
        ("jsonl:nowhere", "jsonl:nowhere"),
    ],
)
def test_a_run_keeps_where_its_data_is(places, monkeypatch, given, kept):
    """From another directory the run resumes on the same data, however --data spells it."""
    for name in ("easy_vqa", "mmstar", "train"):
        Path(name).mkdir()  # a folder of that name does not hide the data set
    kept = kept.replace("HERE", str(places))
    model, config = parse_config(["--data", given, "--eval", given, "--out", "~/run"])
    assert (config.data, config.eval, config.out) == (kept, kept, f"{places}/home/run")
    assert model.lm_tokenizer == "train"
    run = Path(config.out)
    run.mkdir()
    save_run_config(run, model, dataclasses.replace(config, eval=given))
    monkeypatch.chdir(places / "home")
    shutil.rmtree(places / "home" / "data")
    again = parse_config(["--resume", "--out", "~/run", "--data", kept])[1]
    assert (again.data, again.out) == (kept, str(run))


def test_a_new_data_sets_folder_is_kept_too(places, monkeypatch):
    """One class and one line in SOURCES are all that a data set needs."""

    class Birds(JsonLines):
        FORMS = ("birds", "birds:FOLDER")

    monkeypatch.setitem(SOURCES, "birds", Birds)
    for given, kept in (("birds:data", f"birds:{places}/here/data"), ("birds", "birds")):
        assert absolute_paths({"data": given}) == {"data": kept}


def test_a_run_that_has_its_data_relative_resumes_where_it_did(places):
    save_run_config(places, VLMConfig(), TrainConfig(data="jsonl:data"))
    for given in ([], ["--data", "jsonl:data"], ["--data", f"jsonl:{places}/here/data"]):
        assert (
            parse_config(["--resume", "--out", "..", *given])[1].data == f"jsonl:{places}/here/data"
        )


@pytest.mark.parametrize(
    "options", ["--start-from RUN", "--lm-tokenizer RUN", "--data jsonl:RUN/data --device cpu"]
)
def test_what_a_command_reads_it_does_not_overwrite(finished, copy, capsys, options):
    (copy / "data").mkdir()
    given = options.replace("RUN", str(copy)).split()
    with pytest.raises(SystemExit):
        parse_config([*given, "--out", str(copy / ".." / copy.name), "--overwrite"])
    error = capsys.readouterr().err.strip()
    assert " ".join(given[:2]) in error and "--overwrite" in error and "\n" not in error


def test_home_is_home_in_every_option_that_names_a_place(copy, tmp_path, monkeypatch, capsys):
    """A shell does not expand ~ in --out=~/FOLDER."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = "--checkpoint=~/copy --image=~/a.png --prompt x --max-new-tokens 1 --device cpu"
    assert generate.main(asked.split()) == 0, capsys.readouterr().err
    exported = "--checkpoint=~/copy --to nanovlm --out=~/exported"
    assert export.main(exported.split()) == 0, capsys.readouterr().err
    small = "--vit-img-size 32 --mp-pixel-shuffle-factor 2 --workers 0"
    (tmp_path / "data").mkdir()
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(record))
    shards = f"--data jsonl:~/data --out=~/shards {small}"
    assert prepare.main(shards.split()) == 0, capsys.readouterr().err
    assert (tmp_path / "exported" / "config.json").exists()
    assert (tmp_path / "shards" / "manifest.json").exists()
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("jsonl:/home/me/cats", "jsonl:cats"),
        ("/home/me/cats:a,b", "cats:a,b"),
        ("/home/me/cats", "cats"),
        ("mmstar:/home/me/stars", "mmstar:stars"),
        ("OWNER/NAME:a,b", "OWNER/NAME:a,b"),
        ("easy_vqa", "easy_vqa"),
        ("synthetic:32", "synthetic:32"),
        ("", ""),
    ],
)
def test_a_model_card_shows_no_path_of_a_machine(data, shown):
    assert without_path(data) == shown
