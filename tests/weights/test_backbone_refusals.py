"""Backbones that do not fit, are damaged, or cannot be reached: one line names what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import (
    PreTrainedTokenizerFast,
)

from nanovlm_fast.cli import parse_config
from nanovlm_fast.data.text import EOS, Tokenizer
from tests.support import forks
from tests.support.backbones import RUN, both, start
from tests.support.processes import run_python


def set_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def error_of(options: str, **env: str) -> str:
    result = forks.run("train.py", *RUN.split(), *options.split(), **env)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and result.stderr.strip().endswith(errors[0]), result.stderr
    return errors[0]


def refused(capsys, options: str) -> str:
    """The line with which the command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(options.split())
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


ARCHITECTURES = {  # which backbone, changes to its config.json -> what must be said
    "another architecture": ("language", dict(model_type="gpt2"), "Llama-architecture"),
    "a tower as language model": (
        "language",
        dict(model_type="siglip_vision_model"),
        "Llama-architecture",
    ),
    "no architecture": ("language", dict(model_type="nosuch"), "config.json"),
    "variable resolution": ("vision", dict(model_type="siglip2_vision_model"), "SigLIP tower"),
    "a language model as tower": ("vision", dict(model_type="llama"), "SigLIP tower"),
    "other activation": ("vision", dict(hidden_act="relu"), "hidden_act"),
    "biases": ("language", dict(attention_bias=True), "attention_bias"),
    "heads of another width": ("language", dict(head_dim=16), "head_dim"),
    "scaled positions": (
        "language",
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}),
        "rope_type",
    ),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_backbone_of_another_architecture_is_refused(tmp_path, backbones, capsys, case):
    part, changes, said = ARCHITECTURES[case]
    copy = shutil.copytree(backbones, tmp_path / "copy")
    set_json(copy / part / "config.json", **changes)
    error = refused(capsys, both(copy))
    assert said in error and str(copy / part) in error


SIZES = {
    "--vit-hidden-dim 96": "--vit-hidden-dim 96: the pretrained weights have 48",
    "--lm-n-blocks 2": "--lm-n-blocks 2: the pretrained weights have 3",
    "--no-lm-tie-weights": "--lm-tie-weights False",
    "--lm-vocab-size 299": "--lm-vocab-size 299.*300 rows",
    "--vit-img-size 36": "vit_img_size = 36",
    "--lm-tokenizer train": "--lm-tokenizer train",
    "--start-from x": "--start-from",
}


@pytest.mark.parametrize("options", SIZES)
def test_sizes_that_the_weights_do_not_have_are_refused(backbones, capsys, options):
    assert re.search(SIZES[options], refused(capsys, both(backbones, options)))


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, backbones):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.load(backbones / "language").base, eos_token=EOS
    )
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(30)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    error = error_of(
        both(backbones, f"--lm-tokenizer {tmp_path / 'tokenizer'} --out {tmp_path / 'run'}")
    )
    assert "tokenizer has" in error and "--lm-vocab-size is 300" in error
    assert not (tmp_path / "run").exists()


def drop_index(folder: Path) -> None:
    """Two shards without the index that names them."""
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        shutil.copy(folder / "model.safetensors", folder / file)
    (folder / "model.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE = {  # what is done to the folder of the language model -> what must be said
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(b"1234"),
        r"model\.safetensors is damaged",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "configuration": (
        lambda f: (f / "config.json").write_text("{"),
        r"config\.json is not one that",
    ),
    "only pickles": (only_pickles, r"no model\.safetensors.*pytorch_model\.bin.*are not read"),
    "no index": (drop_index, r"no model\.safetensors"),
    "shard": (lose_a_shard, r"model-00001-of-00002\.safetensors is missing"),
    "layer": (
        lambda f: set_json(f / "config.json", num_hidden_layers=4),
        r"no layers\.3\.self_attn\.q_proj",
    ),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json; --lm-tokenizer"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_and_incomplete_backbones_are_named(tmp_path, backbones, capsys, case):
    change, said = DAMAGE[case]
    copy = shutil.copytree(backbones, tmp_path / "copy")
    change(copy / "language")
    try:
        packed, _ = start(both(copy))
        Tokenizer.from_hub(packed.config.lm_tokenizer)
        error = ""
    except SystemExit:  # refused with the command line
        error = capsys.readouterr().err
    except (ValueError, FileNotFoundError) as raised:
        error = str(raised)
    assert re.search(said, error) and str(copy) in error and "\n" not in error.strip(), error


def test_weights_of_another_shape_stop_the_command_and_leave_nothing(tmp_path, backbones):
    copy = shutil.copytree(backbones, tmp_path / "copy")
    set_json(copy / "language" / "config.json", intermediate_size=160)
    error = error_of(both(copy, f"--out {tmp_path / 'run'}"))
    assert "gate_proj.weight has shape (80, 48), the model's is (160, 48)" in error
    assert not (tmp_path / "run").exists()


UNREACHABLE = {
    "offline": dict(HF_HUB_OFFLINE="1"),
    "no network": dict(HF_ENDPOINT="http://127.0.0.1:9"),
}


@pytest.mark.parametrize("how", UNREACHABLE)
@pytest.mark.parametrize("option", ["--vision", "--start-from"])
def test_what_the_hub_does_not_give_is_named_with_a_way_out(tmp_path, how, option):
    error = error_of(
        f"{option} someone/something --out {tmp_path / 'run'}",
        **UNREACHABLE[how],
        HF_HOME=str(tmp_path / "home"),
        HF_HUB_ETAG_TIMEOUT="1",
    )
    assert "'someone/something'" in error and "give a folder" in error and "hf download" in error
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(capsys, tmp_path):
    assert "no such folder" in refused(capsys, f"--vision {tmp_path / 'nowhere'}")


def test_the_hubs_cache_serves_a_name_offline(tmp_path, backbones):
    """A repository in the cache's own layout, as a download leaves it."""
    snapshot = tmp_path / "home" / "hub" / "models--some--tower" / "snapshots" / ("a" * 40)
    shutil.copytree(backbones / "vision", snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    program = (
        "from nanovlm_fast.cli import parse_config\n"
        "from nanovlm_fast.model.packed import VisionLanguageModel\n"
        "from nanovlm_fast.weights.backbones import load_pretrained_weights\n"
        "options = ['--vision', 'some/tower', '--mp-pixel-shuffle-factor', '2']\n"
        "config, train = parse_config(options)\n"
        "model = VisionLanguageModel(config); load_pretrained_weights(model, train)\n"
        "print(config.vit_hidden_dim, model.vision_encoder.layer_norm.bias.std().item() > 0.1)"
    )
    result = run_python("-c", program, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert (result.returncode, result.stdout) == (0, "48 True\n"), result.stderr
