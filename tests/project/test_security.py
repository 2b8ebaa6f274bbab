"""What SECURITY.md promises.

Nothing that is read runs code, and no name in data leads out of its folder.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nanovlm_fast import VisionLanguageModel
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data import prepare
from nanovlm_fast.data.images import FORMATS, BadImage, load_image
from nanovlm_fast.data.sources.cauldron import read_splits
from nanovlm_fast.data.sources.llava import JsonLines
from nanovlm_fast.data.sources.shards import Prepared
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.weights.backbones import hub_config, language_fields, read_tensors
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.project.test_layout import PRODUCT, sources
from tests.support.processes import ROOT
from tests.support.samples import SMALL

# ---- forbidden calls

MODULES = frozenset(
    "pickle cPickle _pickle dill cloudpickle shelve marshal joblib jsonpickle pickletools".split()
)
BUILTINS = frozenset(
    "eval exec compile __import__".split()
)  # by these bare names only: model.eval() is something else
CALLS = frozenset(  # the ends of full names that may not be called
    "os.system os.popen os.execv os.execvp os.spawnl os.spawnv pty.spawn ctypes.CDLL "
    "subprocess.getoutput subprocess.getstatusoutput tempfile.mktemp "
    "hub.load hub.load_state_dict_from_url torch.jit.load "
    "all_gather_object broadcast_object_list gather_object scatter_object_list "
    "send_object_list recv_object_list "
    "yaml.load yaml.load_all yaml.full_load yaml.unsafe_load read_pickle".split()
)
ARGUMENTS = {
    "allow_pickle": False,
    "trust_remote_code": False,
    "shell": False,
    "weights_only": True,
}  # if given, it must be this
NEEDED = (  # what such a call must pass
    (r"torch\.load", "weights_only", True),
    (r"(.*\.)?extractall", "filter", "data"),
    (r"(.*\.)?Auto\w+\.from_pretrained", "trust_remote_code", False),
)


def dotted(node: ast.AST) -> str:
    """The text `a.b.c` of such an expression, with ? for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def full_names(tree: ast.AST) -> dict[str, str]:
    """Local names -> what they were imported from."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return names


def literal(node: ast.AST) -> object:
    return node.value if isinstance(node, ast.Constant) else node


def faults_of_call(name: str, arguments: dict[str | None, object]) -> list[str]:
    """What is forbidden about a call of `name` with these keyword arguments.

    An argument that is not a literal could have any value.
    """
    found = [
        f"{key} of {name}"
        for key, only in ARGUMENTS.items()
        if arguments.get(key, only) is not only
    ]
    found += [
        f"{name} without {k}={v}"
        for call, k, v in NEEDED
        if re.fullmatch(call, name) and arguments.get(k) != v
    ]
    if name.removeprefix("builtins.") in BUILTINS or any(
        f".{name}".endswith(f".{end}") for end in CALLS
    ):
        found.append(name)
    return found


def forbidden(source: str) -> list[str]:
    """Everything in a module's source that SECURITY.md rules out: 'line: what'."""
    tree, found = ast.parse(source), []
    names = full_names(tree)
    for node in ast.walk(tree):
        what: list[str] = []
        if isinstance(node, ast.Import):
            what = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            what = [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            head, _, rest = dotted(node.func).partition(".")
            name = ".".join(filter(None, (names.get(head, head), rest)))
            what = faults_of_call(name, {word.arg: literal(word.value) for word in node.keywords})
            if (
                name == "ctypes.CDLL" and ast.unparse(node) == "ctypes.CDLL(None)"
            ):  # in this process, which loads nothing
                what = []
        found += [f"{node.lineno}: {item}" for item in what]
    return found


# bench.compiled_step runs the code that PyTorch has just generated in the same process, and loads a
# library that it has compiled itself. Nothing of it comes from data.
OF_THE_COMPILED_STEP = {
    "bench/subjects/fake_h100.py": ["ctypes.CDLL"],
    "bench/subjects/lowered.py": ["exec", "compile"],
    "bench/subjects/masked_loads.py": ["exec"],
}


def test_no_forbidden_call_is_in_the_project():
    files = [*PRODUCT, *sources("setup.py")]
    parts = {file.relative_to(ROOT).parts[0] for file in files}
    assert parts == {"nanovlm_fast", "kernels", "bench", "train.py", "setup.py"}
    found = {
        str(file.relative_to(ROOT)): faults
        for file in files
        if (faults := forbidden(file.read_text()))
    }
    names = {file: [line.split(": ")[1] for line in faults] for file, faults in found.items()}
    assert names == OF_THE_COMPILED_STEP, found


BAD = """
import pickle
import pickle as p
import dill, shelve
from pickle import loads
from marshal import load
import joblib.numpy_pickle
def f(): import cloudpickle
torch.load(f)
torch.load(f, map_location="cpu")
torch.load(f, weights_only=False)
torch.load(f, weights_only=flag)
from torch import load; load(f)
import torch as t; t.load(f)
np.load(f, allow_pickle=True)
numpy.save(f, a, allow_pickle=x)
AutoModel.from_pretrained(name)
transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=True)
load_dataset(name, trust_remote_code=True)
eval("1")
exec(code)
compile(code, "", "exec")
__import__(name)
os.system("ls")
from os import system; system("ls")
os.popen("ls")
subprocess.run("ls", shell=True)
from subprocess import Popen; Popen("ls", shell=True)
subprocess.run("ls", shell=flag)
subprocess.getoutput("ls")
yaml.load(text)
yaml.unsafe_load(text)
tempfile.mktemp()
from tempfile import mktemp; mktemp()
torch.hub.load("a/b", "c")
torch.hub.load_state_dict_from_url(url)
torch.distributed.all_gather_object(out, value)
dist.broadcast_object_list(values)
dist.gather_object(value)
dist.scatter_object_list(out, values)
pd.read_pickle(file)
torch.jit.load(file)
archive.extractall(folder)
"""
GOOD = """
import ctypes; ctypes.CDLL(None).prctl(1, 9)
import json, pickles_of_ours
torch.load(f, weights_only=True)
np.load(f)
np.load(f, allow_pickle=False)
AutoConfig.from_pretrained(folder, trust_remote_code=False)
VisionLanguageModel.from_pretrained(folder)
model.eval()
model.to(device).eval()
re.compile("a")
torch.compile(model, mode="default")
subprocess.run(["ls"])
subprocess.run(["ls"], shell=False)
yaml.safe_load(text)
json.load(file)
dist.all_gather(out, value)
safetensors.torch.load(content)
"""


@pytest.mark.parametrize("snippet", BAD.strip().splitlines())
def test_the_checker_finds_each_forbidden_call(snippet):
    assert forbidden(snippet), snippet


@pytest.mark.parametrize("snippet", GOOD.strip().splitlines())
def test_the_checker_finds_nothing_else(snippet):
    assert not forbidden(snippet)


# ---- dependencies and promises


def requirements() -> list[str]:
    """Every requirement in pyproject.toml: of the build, the package and its extras."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(
        r"^(?:requires|dependencies|flash|bench|test)\s*=\s*\[(.*?)\]$", text, re.M | re.S
    )
    assert len(lists) == 5
    return [
        item
        for content in lists
        for item in re.findall(r'"([^"]+)"', re.sub(r"(?m)\s#.*$", "", content))
    ]


def test_every_dependency_has_a_minimum_version():
    found = requirements()
    assert len(found) > 20 and "numpy>=1.26" in found
    assert not [item for item in found if not re.match(r"[\w.-]+>=\d", item)]


def test_every_promise_names_a_test_that_is_there():
    text = (ROOT / "SECURITY.md").read_text()
    for promise in re.findall(r"^- .*(?:\n  .*)*", text, re.M):
        assert re.search(r"tests/[\w/]+\.py::test_", promise), promise
    named = re.findall(r"tests/([\w/]+\.py)::(\w+)", text)
    assert len(named) >= 12
    assert not [
        name for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()
    ]


# ---- paths stay in their folder


@pytest.fixture
def outside(tmp_path) -> Path:
    """A picture that no data set may read."""
    from PIL import Image

    (tmp_path / "outside").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside" / "secret.png")
    return tmp_path / "outside"


@pytest.mark.parametrize(
    "name",
    [
        "../outside/secret.png",
        "ABSOLUTE",
        "link.png",
        "linked/secret.png",
        "a/../../outside/secret.png",
        "a/up",
    ],
)
def test_an_image_name_does_not_leave_its_folder(outside, tmp_path, name):
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    (folder / "a" / "up").symlink_to("../../outside/secret.png")
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    name = name.replace("ABSOLUTE", str(outside / "secret.png"))
    (folder / "train.jsonl").write_text(
        json.dumps({"image": ["in.png", name], "conversations": talk})
    )
    with pytest.raises(ValueError, match=r"train\.jsonl:1: .*outside"):
        JsonLines("train", folder)[0]


@pytest.mark.parametrize("way", ["dots", "absolute", "link", "folder"])
def test_a_manifests_file_does_not_leave_its_folder(tmp_path, way):
    out = tmp_path / "out"
    assert (
        prepare.main(
            (
                f"--data synthetic:32 --out {out} --workers 0 --shard-samples 256 --vit-img-size 32"
            ).split()
        )
        == 0
    )
    shard, manifest = out / "shard-00000.arrow", json.loads((out / "manifest.json").read_text())
    elsewhere = tmp_path / "elsewhere.arrow"
    shard.rename(elsewhere)
    name = {
        "dots": "../elsewhere.arrow",
        "absolute": str(elsewhere),
        "link": shard.name,
        "folder": "a/x.arrow",
    }[way]
    if way == "link":
        shard.symlink_to(elsewhere)
    manifest["shards"][0]["file"] = name
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json .*outside"):
        Prepared(out)
    assert prepare.main(["--verify", "--out", str(out)]) == 1


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_indexs_file_does_not_leave_its_folder(tmp_path, name):
    from safetensors.numpy import save_file

    (tmp_path / "model").mkdir()
    save_file({"a": np.zeros(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name}})
    )
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        read_tensors(str(tmp_path / "model"), lambda _: True)


def test_links_of_the_hubs_cache_are_followed_and_hold_safetensors_or_nothing(tmp_path):
    """A snapshot is a folder of links to ../../blobs.

    The files that the links lead to are read by the same readers as any other file.
    """
    config = VLMConfig(**{**SMALL, "lm_vocab_size": 300})
    tokenizer = Tokenizer.train(["a red cat"] * 9, 300)
    save_pretrained(tmp_path / "blobs", VisionLanguageModel(config), tokenizer)
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load_pretrained(snapshot)[0].config == config
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_pretrained(snapshot)


# ---- nothing that is read runs


def write_code(folder: Path, *names: str) -> Path:
    """Python files in the folder that make a file `ran` beside it when they are run."""
    ran = folder.parent / "ran"
    for name in names:
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\nclass Custom: ...\n")
    return ran


def test_a_config_with_code_of_its_own_runs_none(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    ran = write_code(
        folder,
        "configuration_custom.py",
        "modeling_custom.py",
        "tokenization_custom.py",
        "setup.py",
    )
    auto = {f"Auto{kind}": f"{kind.lower()}uration_custom.Custom" for kind in ("Config",)}
    auto |= {
        "AutoModel": "modeling_custom.Custom",
        "AutoTokenizer": ["tokenization_custom.Custom", None],
    }
    sizes = dict(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
    )
    for kind in ("llama", "custom"):
        (folder / "config.json").write_text(
            json.dumps({"model_type": kind, **sizes, "auto_map": auto})
        )
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": auto, "eos_token": "</s>"})
        )
        if kind == "llama":
            assert language_fields(str(folder))["lm_hidden_dim"] == 48
        else:
            with pytest.raises(ValueError, match=r"config\.json"):
                hub_config(str(folder))
        with pytest.raises((OSError, ValueError)):
            Tokenizer.from_hub(str(folder))
        assert not ran.exists()


def test_a_checkpoint_with_code_of_its_own_runs_none(tmp_path):
    config = VLMConfig(**{**SMALL, "lm_vocab_size": 300})
    folder = tmp_path / "model"
    save_pretrained(folder, VisionLanguageModel(config), Tokenizer.train(["a red cat"] * 9, 300))
    ran = write_code(folder, "modeling_custom.py", "__init__.py")
    values = json.loads((folder / "config.json").read_text())
    values |= {"auto_map": {"AutoModel": "modeling_custom.Custom"}, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="auto_map"):
        VisionLanguageModel.from_pretrained(folder)
    assert not ran.exists() and "modeling_custom" not in sys.modules


def test_a_data_set_with_a_loading_script_runs_none(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    ran = write_code(folder, "data.py", "dataset.py", "__init__.py")
    with pytest.raises(OSError, match="data set"):
        read_splits(str(folder))
    assert not ran.exists()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_on_an_image(tmp_path, monkeypatch):
    """Pillow reads EPS with Ghostscript, which it looks for on the PATH.

    The one on the PATH here leaves a file if it is called.
    """
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for source in (EPS, tmp_path / "picture.eps", tmp_path / "picture.png"):
        if isinstance(source, Path):
            source.write_bytes(EPS)
        with pytest.raises(BadImage):
            load_image(source, 8)
    assert not (tmp_path / "called").exists()
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"} <= set(FORMATS) and "EPS" not in FORMATS


def test_what_an_image_is_called_does_not_command_the_terminal(tmp_path):
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    names = ("\x1b[2J\x07.png", "a\nskipped, unreadable: b", "../\x1b]0;title\x07", "x" * 10_000)
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"image": n, "conversations": talk}) for n in names)
    )
    source = JsonLines("train", tmp_path)
    for i in range(len(names)):
        with pytest.raises(ValueError) as caught:
            load_image(source[i].images[0], 8)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
