"""The layout: who may import whom, and what a training step needs.

Also the name `kernels`, the sizes of files and functions, and no local paths.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nanovlm_fast.kernels
from tests.support.processes import ROOT, run_python


def sources(part: str) -> list[Path]:
    """The Python files of a top-level file or folder.

    nanovlm_fast/kernels is a link and is not followed.
    """
    place = ROOT / part
    found = (
        [place]
        if place.is_file()
        else [Path(d, f) for d, _, files in os.walk(place) for f in files]
    )
    return sorted(file for file in found if file.suffix == ".py")


PRODUCT = [
    file for part in ("nanovlm_fast", "kernels", "bench", "train.py") for file in sources(part)
]


def imports(file: Path) -> set[str]:
    """Full dotted names of everything that the file imports, anywhere in it.

    `from a import b` counts as a and a.b.
    """
    package = file.relative_to(ROOT).parent.parts
    if package[:1] == ("kernels",):  # installed as nanovlm_fast.kernels
        package = ("nanovlm_fast", *package)
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def crossings(names: set[str], *forbidden: str) -> set[str]:
    return {
        name for name in names for part in forbidden if name == part or name.startswith(f"{part}.")
    }


def test_imports_run_one_way():
    wrong = {}
    for file in PRODUCT:
        names, part = imports(file), file.relative_to(ROOT).parts[0]
        forbidden = ["tests", "conftest", "kernels"]  # plain `kernels` is Hugging Face's
        if part in ("kernels", "nanovlm_fast"):
            forbidden += ["bench", "train"]
        found = crossings(names, *forbidden)
        if part == "kernels":
            found |= (
                crossings(names, "nanovlm_fast")
                - crossings(names, "nanovlm_fast.kernels")
                - {"nanovlm_fast"}
            )
            own = {*sys.stdlib_module_names, "torch", "triton", "nanovlm_fast"}
            found |= {name for name in names if name.split(".")[0] not in own}
        if part == "train.py":
            found |= crossings(names, "bench")
        if found:
            wrong[str(file.relative_to(ROOT))] = sorted(found)
    assert not wrong


# The floors of the house, from the ground up. A module imports what is on its own floor or below.
FLOORS = (
    "kernels ranges threads paths files command config device ranks",
    "presets runs packing",
    "model",
    "data",
    "weights",
    "generate evaluate export lmms_eval chat cli data.prepare",
    "reporting",
    "training tune demo",
)
# The package's own `__init__` is its public face: it hands on one class, when that is asked for.
# `nanovlm_fast.model` was one file, from which users imported that class.
PUBLIC_FACE = {("nanovlm_fast.model", "nanovlm_fast")}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph(part: str) -> dict[str, set[str]]:
    """The modules of a top-level folder, and the modules of it that each imports anywhere."""
    files = {module_name(file): file for file in sources(part)}
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        found = imports(file) & files.keys()
        # `from a import b` counts as a and a.b: where a.b is a module, a itself is not meant
        packages = {full.rpartition(".")[0] for full in found}
        exact = {full for full in found if full not in packages or imports_names_of(file, full)}
        graph[name] = exact - {name}
    return graph


def imports_names_of(file: Path, package: str) -> bool:
    """Whether the file imports something from the package that is no module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import) and package in {alias.name for alias in node.names}:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == package:
            place = ROOT.joinpath(*package.split("."))
            for alias in node.names:
                if not ((place / alias.name).is_dir() or (place / f"{alias.name}.py").exists()):
                    return True
    return False


def floor(module: str) -> int:
    """The floor that a module of nanovlm_fast is on; the package itself is on top."""
    inside = module.removeprefix("nanovlm_fast").removeprefix(".")
    on = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
    return on.get(inside, on[inside.split(".")[0]]) if inside else len(FLOORS)


@pytest.mark.parametrize("part", ["nanovlm_fast", "bench"])
def test_no_imports_form_a_circle(part):
    graph = import_graph(part)
    assert sum(map(len, graph.values())) > 50, "the imports were not read"
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_import_runs_up():
    graph = import_graph("nanovlm_fast")
    up = {
        (module, other)
        for module, others in graph.items()
        for other in others
        if floor(other) > floor(module)
    }
    assert up == PUBLIC_FACE


def test_rooms_say_what_lives_there_and_stay_small():
    for folder in {file.parent for file in PRODUCT} - {ROOT, ROOT / "kernels"}:
        first = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert first, f"{folder}/__init__.py does not say what lives there"
        files = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        most = 24 if folder == ROOT / "bench" else 15
        assert len(files) <= most, f"{folder} has {len(files)} files"


def test_the_reference_stands_alone():
    names = imports(ROOT / "nanovlm_fast" / "model" / "reference.py")
    ours = crossings(names, "nanovlm_fast", "kernels")
    assert "nanovlm_fast.config" in ours, "the imports were not read"
    assert ours == crossings(ours, "nanovlm_fast.config", "nanovlm_fast.model.init")
    others = {name.split(".")[0] for name in names - ours}
    assert others <= {*sys.stdlib_module_names, "torch"}


STEP = """
import sys
from importlib.machinery import PathFinder

BLOCKED = {
    "transformers", "datasets", "wandb", "easy_vqa", "matplotlib", "tqdm", "huggingface_hub",
    "kernels",
}


class NotInstalled(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else super().find_spec(name, path, target)


sys.meta_path[:] = [NotInstalled if finder is PathFinder else finder for finder in sys.meta_path]
try:
    import wandb
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker does not block")

import dataclasses
import tempfile
from pathlib import Path

import torch

import nanovlm_fast.kernels
from nanovlm_fast.data.budget import measure_budget
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source, texts
from nanovlm_fast.data.stream import PackedStream, initial_states
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.data.workers import loader
from nanovlm_fast.model import attention, reference
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.presets import preset
from nanovlm_fast.training.optim import lr_factor, make_optimizers, set_lr
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.pretrained import load_pretrained

model_config, config = preset("tiny")
config = dataclasses.replace(
    config, data="synthetic", curriculum="", tokens_per_batch=1024, workers=0
)
source = load_source(config.data, "train")
tokenizer = Tokenizer.train(texts(source, model_config.prompt), model_config.lm_vocab_size)
text = TextProcessor(tokenizer, model_config.prompt, model_config.image_tokens)
load = SampleLoader(source, model_config, config, text)
batches = iter(loader(PackedStream(load, measure_budget(load, config), initial_states(1))))
torch.manual_seed(0)
model = VisionLanguageModel(model_config)
optimizers = make_optimizers(model, config)
set_lr(optimizers, lr_factor(0.5, 0.5, 0, 0.1))
batch = next(batches).packed
losses = []
for _ in range(3):
    loss = model(batch) / batch.n_labels
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
assert losses[2] < losses[0], losses
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(Path(folder), model, tokenizer)
    load_pretrained(folder)
assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
print("trained")
"""


def test_a_training_step_needs_none_of_the_optional_packages():
    result = run_python("-c", STEP)
    assert (result.returncode, result.stdout) == (0, "trained\n"), result.stderr


# ---- the name `kernels`


def test_nanovlm_fast_kernels_is_our_folder():
    assert [Path(place).resolve() for place in nanovlm_fast.kernels.__path__] == [ROOT / "kernels"]


@pytest.fixture
def hugging_face_kernels() -> Path:
    """Hugging Face's package of that name, which the [test] extra installs."""
    try:
        files = importlib.metadata.files("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's package `kernels` is not installed")
    return next(
        Path(file.locate()).resolve() for file in files if str(file) == "kernels/__init__.py"
    )


def test_import_kernels_from_the_root_is_hugging_faces(hugging_face_kernels):
    program = "import kernels, transformers; kernels.get_kernel; print(kernels.__file__)"
    result = run_python("-c", program)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve() == hugging_face_kernels


def test_train_py_sees_hugging_faces_kernels(hugging_face_kernels, tmp_path):
    """A real `python train.py` that at its end writes down what `import kernels` gives it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, importlib.util, pathlib\n"
        "note = pathlib.Path(__file__).with_name('note')\n"
        "atexit.register(lambda: note.write_text(importlib.util.find_spec('kernels').origin))\n"
    )
    result = run_python("train.py", "--help", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert Path((tmp_path / "note").read_text()).resolve() == hugging_face_kernels


# ---- what is written


def project_files() -> Iterator[Path]:
    """Everything but hidden folders, runs, builds and virtual environments."""
    for folder, folders, files in os.walk(ROOT):
        skipped = {"runs", "wandb", "build", "__pycache__"}
        folders[:] = [
            name
            for name in folders
            if name not in skipped
            and not name.startswith(".")
            and not name.endswith(".egg-info")
            and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        yield from (Path(folder, file) for file in files)


def test_no_path_of_one_machine_is_written_down():
    places = [
        f"/{name}" for name in ("work/", "tmp/bash_jobs", "farm/")
    ]  # so that this file holds none itself
    files = [file for file in project_files() if file.suffix in (".py", ".md", ".toml", ".ipynb")]
    assert ROOT / "README.md" in files and Path(__file__).resolve() in files
    found = [
        (str(file.relative_to(ROOT)), place)
        for file in files
        for place in places
        if place in file.read_text()
    ]
    assert not found


def test_files_and_functions_stay_short():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 300
    long = []
    for file in PRODUCT + sources("tests"):
        text = file.read_text()
        if (count := len(text.splitlines())) > 500:
            long.append(f"{file.relative_to(ROOT)}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = node.end_lineno - node.lineno + 1
                if count > 80:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {count} lines")
    assert len(PRODUCT) > 10 and not long
