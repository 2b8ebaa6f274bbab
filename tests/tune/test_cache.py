"""The cache: each field of the key is a miss, damage is a miss, what failed is remembered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.tune import cache, key
from nanovlm_fast.tune.cache import Entry
from nanovlm_fast.tune.candidates import Choice
from nanovlm_fast.tune.key import key_of
from nanovlm_fast.tune.search import LEFT_OUT, Found, Row

CPU = torch.device("cpu")
BUDGET = Budget(512, 40, 6, 200, 64)
ROW = Row("rotary", "language", LEFT_OUT, "died of SIGSEGV")


def a_key(**changes: object) -> dict:
    train = dataclasses.replace(TrainConfig(), **changes)
    return key_of(VLMConfig(), train, BUDGET, CPU, torch.bfloat16, several=False)


def an_entry(**changes: object) -> Entry:
    found = Found(Choice(("rms_norm",)), [ROW], done=True)
    return dataclasses.replace(Entry.of(a_key(), Choice(), found, 12.34), **changes)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "nanovlm_fast" / "tuned"


def test_what_is_written_is_read(caches):
    assert cache.read(a_key()) is None and cache.newest() is None
    cache.write(an_entry())
    (file,) = caches.iterdir()
    assert cache.read(a_key()) == cache.newest() == an_entry(date=cache.newest().date)
    assert file == cache.file_of(a_key()) and file.name.endswith(".json")


def test_without_the_variable_it_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folders/are/ignored")
    assert cache.folder() == tmp_path / ".cache" / "nanovlm_fast" / "tuned"


def flattened(values: dict, path: tuple = ()) -> list[tuple]:
    found = []
    for name, value in values.items():
        inner = flattened(value, (*path, name)) if isinstance(value, dict) and value else None
        found += inner or [(*path, name)]
    return found


def test_without_any_home_folder_nothing_is_found_and_nothing_ends(monkeypatch, capsys):
    """A container's user may have no name and no $HOME."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert cache.read(a_key()) is None and not capsys.readouterr().out
    cache.Notebook(a_key(), Choice(), 0.0)(Found(Choice()))
    assert "is not kept: no home folder: set HOME or XDG_CACHE_HOME" in capsys.readouterr().out
    with pytest.raises(OSError, match="no home folder"):
        cache.newest()


def test_each_field_of_the_key_changed_is_a_miss():
    cache.write(an_entry())
    fields = flattened(a_key())
    assert len(fields) > 35
    for path in fields:
        other = json.loads(json.dumps(a_key()))
        place = other
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = "changed"
        assert cache.read(other) is None, path
    assert cache.read(a_key()) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": "blocks"},
        {"lr_vision": 0.0},
        {"optimizer": "muon"},
        {"kernels": "none"},
        {"compile": "default"},
        {"inductor": "none"},
        {"workers": 3},
        {"stream": "bfloat16"},
        {"lora_rank": 8},
    ],
)
def test_how_the_model_is_trained_is_in_the_key(changes, monkeypatch):
    monkeypatch.setattr(key, "autos", lambda device: {**key.GPU_AUTOS, **key.CPU_AUTOS})
    cache.write(an_entry())
    assert cache.read(a_key()) is not None and cache.read(a_key(**changes)) is None


def test_model_budget_type_and_processes_are_in_the_key():
    cache.write(an_entry())
    model = VLMConfig(lm_n_blocks=3)
    budget = dataclasses.replace(BUDGET, images=7)
    alone = (TrainConfig(), BUDGET, CPU, torch.bfloat16)
    others = [
        key_of(model, *alone, several=False),
        key_of(VLMConfig(), TrainConfig(), budget, CPU, torch.bfloat16, several=False),
        key_of(VLMConfig(), TrainConfig(), BUDGET, CPU, torch.float32, several=False),
        key_of(VLMConfig(), *alone, several=True),
    ]
    assert [cache.read(other) for other in others] == [None] * 4
    # The prompt changes nothing that is timed.
    asked = VLMConfig(prompt="{question}?")
    assert cache.read(key_of(asked, *alone, several=False)) is not None


def test_the_kernels_and_their_versions_are_in_the_key(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("a")
    before = key.hash_of(tmp_path)
    (tmp_path / "one.py").write_text("b")
    changed = key.hash_of(tmp_path)
    (tmp_path / "two.py").write_text("")
    assert len({before, changed, key.hash_of(tmp_path)}) == 3
    assert a_key()["triton"] and a_key()["torch"] == torch.__version__


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: text.replace('"rms_norm"', '"no_such_kernel"'),
        lambda text: text.replace('"workers": -1', '"workers": "many"'),
        lambda text: text.replace('"rows": [', '"rows": ["row", '),
        lambda text: text.replace('"done": true', '"done": 1'),
        lambda text: text.replace('"key": {', '"key": {"more": 1, '),
    ],
)
def test_a_damaged_file_means_measuring_again(damage, capsys):
    cache.write(an_entry())
    file = cache.file_of(a_key())
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    assert cache.read(a_key()) is None
    cache.write(an_entry())  # and the file is replaced
    assert cache.read(a_key()) is not None


def test_a_file_is_written_whole_or_not_at_all(caches, monkeypatch):
    cache.write(an_entry())
    before = cache.file_of(a_key()).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write(an_entry(seconds=99.0))
    assert cache.file_of(a_key()).read_bytes() == before and len(list(caches.iterdir())) == 1


def test_what_failed_is_remembered_and_so_is_what_killed_the_measurement():
    done = an_entry()
    assert done.left_out() == {"rotary": "died of SIGSEGV"}
    dead = an_entry(done=False, measuring="swiglu")
    assert dead.left_out()["swiglu"] == "the process that timed it died"
