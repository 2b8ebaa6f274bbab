"""A run written before the modules moved into rooms resumes, evaluates and exports.

`tests/support/run_of_2026_11` was written by the commit before the move: six steps of a very small
model on synthetic pictures. The losses below are what that commit gave when it resumed the run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanovlm_fast import evaluate as evaluating
from nanovlm_fast import export as exporting
from nanovlm_fast.weights.folder import resolve
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support import forks
from tests.support.processes import ROOT
from tests.support.runs import losses

WRITTEN = ROOT / "tests" / "support" / "run_of_2026_11"
LOSSES = {7: 4.61201, 8: 4.53748, 9: 4.39864}


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "run", symlinks=True))


def test_it_resumes_with_the_losses_that_it_would_have_had(run):
    before = losses(run)
    options = ("--resume", "--out", str(run), "--max-steps", "9", "--no-final-eval")
    result = forks.run("train.py", *options)
    assert result.returncode == 0, result.stderr
    after = losses(run)
    assert {step: after[step] for step in before} == before
    assert {step: after[step] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-3)


def test_it_evaluates(run, capsys):
    data = ("--data", "synthetic:32", "--json", "--device", "cpu")
    assert evaluating.main(["--checkpoint", str(run), *data]) == 0
    written = json.loads((run / "result.json").read_text())["seeing"]
    assert json.loads(capsys.readouterr().out)["questions"] == written["questions"]


@pytest.mark.parametrize("target", exporting.TARGETS)
def test_it_exports(run, tmp_path, target):
    out = tmp_path / target
    assert exporting.main(["--checkpoint", str(run), "--to", target, "--out", str(out)]) == 0
    files = (
        ("model.gguf", "mmproj.gguf") if target == "gguf" else ("model.safetensors", "config.json")
    )
    assert all((out / file).exists() for file in files)


def test_its_weights_and_tokenizer_are_read_to_the_bit(run):
    model, tokenizer = load_pretrained(run / "best")
    state = model.reference_state_dict()
    stored = load_file(resolve(run) / "model.safetensors")
    assert stored and all(state[name].equal(tensor) for name, tensor in stored.items())
    assert (
        tokenizer.decode(tokenizer.encode("what color is the square?"))
        == "what color is the square?"
    )
