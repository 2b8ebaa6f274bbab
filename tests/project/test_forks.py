"""Programs that tests start in forks: no test makes later ones start Python anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import forks

pytestmark = pytest.mark.skipif(not forks.can_fork(), reason="no forks on this machine")


def started(tmp_path: Path, program: str, **env: str) -> tuple[object, str]:
    """The process of a program, and what it printed."""
    file = tmp_path / "program.py"
    file.write_text(program)
    with (tmp_path / "out").open("w+") as out, (tmp_path / "err").open("w+") as err:
        process = forks.start([str(file)], out, err, **env)
        assert process.wait(60) == 0, (tmp_path / "err").read_text()
    return process, (tmp_path / "out").read_text()


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "CUBLAS_WORKSPACE_CONFIG"])
def test_what_our_code_sets_is_no_reason_to_start_anew(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "false")
    process, printed = started(tmp_path, f"import os; print(os.environ[{name!r}])")
    assert isinstance(process, forks.Fork) and printed == "false\n"


def test_another_environment_is_one(tmp_path):
    process, printed = started(tmp_path, "import os; print(os.environ['A'])", A="b")
    assert not isinstance(process, forks.Fork) and printed == "b\n"


def test_the_hubs_variables_are_read_anew(tmp_path):
    program = (
        "from huggingface_hub import constants\n"
        "from transformers.utils.hub import is_offline_mode\n"
        "print(constants.HF_HUB_OFFLINE, constants.HF_HOME, is_offline_mode())"
    )
    process, printed = started(tmp_path, program, HF_HUB_OFFLINE="1", HF_HOME="/nowhere")
    assert isinstance(process, forks.Fork) and printed == "True /nowhere True\n"


@pytest.mark.parametrize("turn", ["first", "second"])
def test_a_test_leaves_the_environment_as_it_was(turn):
    assert "SET_BY_A_TEST" not in os.environ
    os.environ["SET_BY_A_TEST"] = turn
