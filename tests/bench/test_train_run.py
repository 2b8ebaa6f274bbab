"""bench.train_run: what it says of a run."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from bench.train_run import TRAIN_PY, train


def test_the_command_can_be_pasted(tmp_path, monkeypatch):
    """Also into a page, where it is the row's command."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(RuntimeError, match=r"^python train\.py --prompt '\{question\} A:' failed"):
        train(tmp_path, TRAIN_PY, ["--prompt", "{question} A:"])
