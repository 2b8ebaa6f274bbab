"""The notebook in examples/: as a user runs it, but with short trainings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.processes import ROOT

NOTEBOOK = ROOT / "examples" / "nanovlm_fast.ipynb"
SHORT = """
REPOSITORY = ""
TRAIN = "--max-steps 4 --val-samples 2 --no-final-eval --device cpu --workers 0"
TUNE = "--max-steps 2 --val-samples 2 --device cpu --workers 0"
PICTURES = 12
"""


def test_it_is_stored_without_what_it_printed():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 8
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of what is committed or about to be, so that no run is left in the repository."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    needed = [name for name in files.splitlines() if not name.startswith(("tests/", "bench/res"))]
    for name in needed:
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_cell_runs_on_a_cpu(clone, monkeypatch):
    """Only the cell of parameters is another."""
    # As where Jupyter runs in another environment: no `python` of the kernel is on the path
    monkeypatch.setenv("PATH", os.defpath)
    book = nbformat.read(clone / "examples" / NOTEBOOK.name, as_version=4)
    (parameters,) = [c for c in book.cells if "parameters" in c.metadata.get("tags", [])]
    names = {line.split(" = ")[0] for line in parameters.source.splitlines()}
    assert names == {line.split(" = ")[0] for line in SHORT.strip().splitlines()}
    parameters.source = SHORT
    place = {"metadata": {"path": str(clone / "examples")}}
    NotebookClient(book, timeout=800, kernel_name="python3", resources=place).execute()
    printed = [printed_by(cell) for cell in book.cells if cell.cell_type == "code"]
    drawn = [cell for cell in book.cells if "image/png" in str(cell.get("outputs"))]
    assert len(drawn) == 6, "both curves, three pictures, the answers"
    said = "".join(printed)
    assert "what color is the shape? " in said and "written: runs/exported" in said
    assert (clone / "runs" / "exported" / "model.safetensors").exists()


def printed_by(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)
