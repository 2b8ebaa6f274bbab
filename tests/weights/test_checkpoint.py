"""Checkpoints: a round trip, errors that name the damage, and the commands that read them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nanovlm_fast
from nanovlm_fast import VisionLanguageModel
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.training import checkpoint as checkpoints
from nanovlm_fast.training.checkpoint import load_checkpoint
from nanovlm_fast.training.optim import make_optimizers
from nanovlm_fast.weights.folder import (
    FIELDS_AFTER_V01,
    newest_checkpoint,
    resolve,
    save_pretrained,
)
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support import forks
from tests.support.processes import run_python
from tests.support.samples import SMALL

CONFIG = VLMConfig(**{**SMALL, "lm_vocab_size": 300})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(
        ["Question: what is it? Answer:", " a red cat", " two cats"] * 9, CONFIG.lm_vocab_size
    )


@pytest.fixture
def saved(tmp_path, tokenizer) -> Path:
    """A checkpoint folder with random weights and tied embeddings."""
    save_pretrained(tmp_path / "model", VisionLanguageModel(CONFIG), tokenizer)
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dict of tensors in the folder's weights."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- the folder


def nanovlm_keys(config: VLMConfig) -> set[str]:
    """The state dict of huggingface/nanoVLM v0.1, written out."""
    keys = {
        f"vision_encoder.patch_embedding.{name}"
        for name in ("conv.weight", "conv.bias", "position_embedding")
    }
    keys |= {"vision_encoder.layer_norm.weight", "vision_encoder.layer_norm.bias", "MP.proj.weight"}
    keys |= {
        f"decoder.{name}"
        for name in ("token_embedding.weight", "rotary_embd.inv_freq", "norm.weight")
    }
    for i in range(config.vit_n_blocks):
        modules = ("ln1", "ln2", "attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2")
        keys |= {
            f"vision_encoder.blocks.{i}.{module}.{kind}"
            for module in modules
            for kind in ("weight", "bias")
        }
    for i in range(config.lm_n_blocks):
        modules = [f"attn.{name}_proj" for name in ("q", "k", "v", "out")]
        modules += [f"mlp.{name}_proj" for name in ("gate", "up", "down")] + ["norm1", "norm2"]
        keys |= {f"decoder.blocks.{i}.{module}.weight" for module in modules}
    return keys


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_bit_for_bit_in_nanovlms_layout(tmp_path, tokenizer, tied):
    config = replace(CONFIG, lm_tie_weights=tied)
    model = VisionLanguageModel(config)
    save_pretrained(tmp_path, model, tokenizer)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == nanovlm_keys(config) | (set() if tied else {"decoder.head.weight"})
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {k: v for k, v in asdict(config).items() if k not in FIELDS_AFTER_V01}

    loaded, text = load_pretrained(tmp_path)
    assert loaded.config == config
    assert (loaded.decoder.head.weight is loaded.decoder.token_embedding.weight) == tied
    before, after = model.reference_state_dict(), loaded.reference_state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert text.encode("a red cat?") == tokenizer.encode("a red cat?")
    assert (len(text), text.eos_id) == (len(tokenizer), tokenizer.eos_id)


def test_a_222m_model_has_nanovlms_424_entries():
    with torch.device("meta"):
        model = VisionLanguageModel(VLMConfig())
    assert set(model.reference_state_dict()) == nanovlm_keys(VLMConfig()) | {"decoder.head.weight"}
    assert len(model.reference_state_dict()) == 424
    assert sum(parameter.numel() for parameter in model.parameters()) == 222_081_600


@pytest.mark.parametrize("stored", ["decoder.head.weight", "decoder.token_embedding.weight"])
def test_either_name_of_the_tied_weights_will_do(saved, stored):
    """nanoVLM uses safetensors' save_model, which keeps one of two shared tensors.

    The rotary buffer may be absent too.
    """
    expected = load_file(saved / "model.safetensors")["decoder.token_embedding.weight"]

    def rename(tensors):
        tensors[stored] = tensors.pop("decoder.token_embedding.weight")
        del tensors["decoder.rotary_embd.inv_freq"]

    rewrite(saved, rename)
    model, _ = load_pretrained(saved)
    assert torch.equal(model.decoder.token_embedding.weight, expected)
    assert torch.equal(model.decoder.head.weight, expected)


K_PROJ = "decoder.blocks.1.attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(K_PROJ), rf"missing {K_PROJ}"),
        (
            lambda t: t.pop("decoder.token_embedding.weight"),
            r"missing decoder\.(token_embedding|head)\.weight",
        ),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda t: t.update({K_PROJ: torch.zeros(3, 5)}),
            rf"{K_PROJ} has shape \(3, 5\).*\(16, 48\)",
        ),
    ],
    ids=["missing", "missing embedding", "extra", "misshapen"],
)
def test_weights_that_do_not_fit_are_named(saved, change, said):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=said):
        load_pretrained(saved)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_named(saved, size):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[1, 2]",
        "null",
        '{"lm_n_heads": 0}',
        '{"lm_n_heads": "six"}',
        '{"vit_hidden_dim": null}',
        '{"lm_hidden_dim": 48.5}',
        '{"prompt": "no place for it"}',
    ],
)
def test_a_configuration_that_makes_no_sense_is_named(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_pretrained(saved)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_a_damaged_tokenizer_is_named(saved, file, text):
    if (file, text) == ("tokenizer_config.json", "{}"):
        pytest.skip("says nothing, which is no damage")
    (saved / file).write_text(text)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        load_pretrained(saved)


def test_unknown_fields_of_a_configuration_are_pointed_out(saved):
    """Those of nanoVLM's own config.json are known."""
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps({**values, "vlm_load_backbone_weights": True, "hf_repo": "x"})
    )
    with pytest.warns(UserWarning, match="fields not used here: hf_repo$"):
        model, _ = load_pretrained(saved)
    assert model.config == CONFIG


def test_the_api_that_nanovlms_users_know(tmp_path, saved, tokenizer):
    """from_pretrained loads what save_pretrained wrote, with or without a tokenizer."""
    model = nanovlm_fast.VisionLanguageModel.from_pretrained(str(saved))
    assert isinstance(model, VisionLanguageModel)
    weights = load_pretrained(saved)[0].state_dict()
    for folder, more in (
        (tmp_path / "a" / "bare", {}),
        (tmp_path / "full", {"tokenizer": tokenizer}),
    ):
        model.save_pretrained(folder, **more)
        again = VisionLanguageModel.from_pretrained(folder, device="cpu")
        assert again.config == model.config
        assert again.state_dict().keys() == weights.keys()
        assert all(
            torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items()
        )
        assert (folder / "tokenizer.json").exists() == bool(more)
    assert load_pretrained(tmp_path / "full")[1].fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="layout 'onnx': there are nanovlm_fast, nanovlm"):
        model.save_pretrained(tmp_path / "other", layout="onnx")
    assert not (tmp_path / "other").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VisionLanguageModel.from_pretrained(tmp_path / "nowhere")


def test_a_loaded_model_is_of_the_public_class_and_saves_itself(saved, tmp_path):
    model, tokenizer = load_pretrained(saved)
    assert type(model) is nanovlm_fast.VisionLanguageModel
    model.save_pretrained(tmp_path / "again", tokenizer=tokenizer)
    again, _ = load_pretrained(tmp_path / "again")
    assert again.config == model.config


def test_the_package_alone_comes_without_torch():
    script = (
        "import sys, nanovlm_fast; assert 'torch' not in sys.modules; "
        "print(nanovlm_fast.VisionLanguageModel.__name__)"
    )
    result = run_python("-c", script)
    assert (result.returncode, result.stdout) == (0, "VisionLanguageModel\n"), result.stderr
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        nanovlm_fast.Nonsense  # noqa: B018


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_and_not_read(saved, name):
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / name)
    for place in (saved, saved / name):
        with pytest.raises(ValueError, match=f"{name}: pickles are not read, only safetensors"):
            load_pretrained(place)
    for command in (
        ["train.py", "--start-from"],
        ["-m", "nanovlm_fast.generate", "--prompt", "what?", "--checkpoint"],
    ):
        result = forks.run(*command, str(saved))
        assert result.returncode != 0 and re.fullmatch(
            r"(train.py: )?error: .*pickles are not read.*\n", result.stderr
        ), result.stderr


# ---- the run


def save_step(run: Path, step: int, tokenizer: Tokenizer, best: int | None = None) -> Path:
    """Write a run's checkpoint at `step`, of a new model and optimizers; return its folder."""
    model = VisionLanguageModel(CONFIG)
    optimizers = make_optimizers(model, TrainConfig())
    return checkpoints.save_checkpoint(
        run, model, tokenizer, optimizers, {"step": step, "best_step": best}
    )


def test_resolve_finds_checkpoints(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for none in (None, tmp_path, tmp_path / "runs" / "a", tmp_path / "runs" / "a" / "last"):
        with pytest.raises(FileNotFoundError, match="run"):
            resolve(none)
    for name in ("a", "b"):
        run = Path("runs") / name
        first, second = save_step(run, 9, tokenizer, 9), save_step(run, 10, tokenizer, 9)
        (run / "config.json").write_text("{}")
        (run / "metrics.jsonl").write_text("")
        (run / "checkpoints" / ".tmp-step-000011").mkdir()
        assert resolve(run) == second and resolve(str(run)) == second and resolve(second) == second
        assert resolve(run / "last").resolve() == second.resolve()
        assert resolve(run / "best").resolve() == first.resolve()
    for name, stamp in (("a", 2e9), ("b", 1e9)):
        os.utime(Path("runs") / name / "metrics.jsonl", (stamp, stamp))
    assert resolve(None).parts[:2] == ("runs", "a"), "the one written to last"
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        resolve("elsewhere")


def test_only_the_last_and_the_best_checkpoint_are_kept(tmp_path, tokenizer):
    for step, best in ((3, None), (6, 6), (9, 6), (12, 6)):
        save_step(tmp_path, step, tokenizer, best)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == [
        "step-000006",
        "step-000012",
    ]
    assert (tmp_path / "best").resolve().name == "step-000006"
    assert (tmp_path / "last").resolve().name == "step-000012"


def test_the_best_is_kept_and_linked_whatever_came_between(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("run")  # relative, as --out usually is
    first = save_step(run, 3, tokenizer, 3)
    save_step(run, 9, tokenizer, 6)  # step 6 was the best but could not be written
    assert first.exists() and (run / "best").resolve() == first.resolve()
    save_step(run, 12, tokenizer, 9)  # step 9 was the best, and the run ended before it was linked
    assert (run / "best").resolve().name == "step-000009" and load_pretrained(run / "best")
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == [
        "step-000009",
        "step-000012",
    ]


class Crash(BaseException):
    """Stands for a machine that goes down: nothing is cleaned up."""


@pytest.mark.parametrize("call", ["save_file", "fsync", "replace", "rmtree"])
@pytest.mark.parametrize("step", [6, 9], ids=["same step again", "next step"])
def test_a_crash_while_saving_loses_no_checkpoint(tmp_path, tokenizer, monkeypatch, call, step):
    """Wherever the process dies, the newest step-* is complete. (A last step is saved twice.)"""
    save_step(tmp_path, 6, tokenizer)
    module = {"save_file": checkpoints, "rmtree": checkpoints.shutil}.get(call, checkpoints.os)
    real, crashes = getattr(module, call), 0
    for allowed in range(20):
        calls = 0

        def crash(*args, allowed=allowed, **kwargs):
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Crash
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, call, crash)
            try:
                save_step(tmp_path, step, tokenizer)
            except Crash:
                crashes += 1
            else:
                break
        newest = newest_checkpoint(tmp_path)
        assert newest is not None, (
            f"no checkpoint is left after {call} number {allowed + 1} did not happen"
        )
        model = VisionLanguageModel(CONFIG)
        assert load_checkpoint(newest, model, make_optimizers(model, TrainConfig()))["step"] in (
            6,
            step,
        )
        assert load_pretrained(tmp_path / "last"), "a link must not point at nothing"
    if (call, step) not in (
        ("rmtree", 6),
        ("save_file", 6),
    ):  # the weights of a step are written once
        assert crashes, f"saving never calls {call}: crash somewhere else"
    assert newest_checkpoint(tmp_path).name == f"step-{step:06d}"


# ---- the commands

COMMANDS = {  # name -> (arguments, exit code, what the last line must say)
    "greedy": ("generate --checkpoint MODEL --image RED --prompt what?", 0, ""),
    "greedy again": ("generate --checkpoint MODEL --image RED --prompt what?", 0, ""),
    "batch": (
        "generate --checkpoint MODEL --image RED --prompt what? --prompt where?",
        0,
        "where?",
    ),
    "sampling": (
        "generate --checkpoint RUN --prompt what? --temperature 1 --top-k 9 --top-p 0.9 --seed 3",
        0,
        "",
    ),
    "no checkpoint": ("generate --checkpoint FOLDER/nothing --prompt what?", 1, "nothing"),
    "corrupt image": (
        "generate --checkpoint MODEL --image CORRUPT --prompt what?",
        1,
        "corrupt.png",
    ),
    "too long": ("generate --checkpoint MODEL --prompt what? --max-new-tokens 9999", 1, "9999"),
    "no such device": ("generate --checkpoint MODEL --prompt what? --device gpu0", 1, "gpu0"),
    "score": ("evaluate --checkpoint MODEL --data synthetic --json", 0, "accuracy"),
    "score blind": ("evaluate --checkpoint RUN --data synthetic --blank-images", 0, "yes/no"),
    "score corrupt": ("evaluate --checkpoint MODEL --data jsonl:FOLDER --json", 0, "corrupt.png"),
    "score nothing": ("evaluate --checkpoint FOLDER/nothing --data synthetic --json", 1, "nothing"),
    "score unknown data": ("evaluate --checkpoint MODEL --data nosuch --json", 1, "nosuch"),
    "score unknown split": (
        "evaluate --checkpoint MODEL --data synthetic --split val --json",
        1,
        "val",
    ),
    "score damaged": (
        "evaluate --checkpoint DAMAGED --data synthetic --json",
        1,
        "model.safetensors",
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tokenizer) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """results(name) -> the outcome of one of COMMANDS, which runs once."""
    folder = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    model = VisionLanguageModel(CONFIG)
    places = {word: folder / word.lower() for word in ("MODEL", "RUN", "DAMAGED")}
    save_pretrained(places["MODEL"], model, tokenizer)
    save_pretrained(places["DAMAGED"], model, tokenizer)
    (places["DAMAGED"] / "model.safetensors").write_bytes(b"1234")
    save_step(places["RUN"], 7, tokenizer)
    places |= {"RED": folder / "red.png", "CORRUPT": folder / "corrupt.png", "FOLDER": folder}
    Image.new("RGB", (50, 40), "red").save(places["RED"])
    places["CORRUPT"].write_bytes(places["RED"].read_bytes()[:50])
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    records = [
        json.dumps({"image": name, "conversations": turns}) for name in ("red.png", "corrupt.png")
    ]
    (folder / "test.jsonl").write_text("\n".join(records))

    @cache
    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = re.sub("|".join(places), lambda word: str(places[word[0]]), COMMANDS[name][0])
        door, *options = command.split()
        return forks.run("-m", f"nanovlm_fast.{door}", *options)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_end_well_or_with_one_clear_line(results, name):
    _, code, said = COMMANDS[name]
    result = results(name)
    assert result.returncode == code, result.stderr
    if code:
        assert re.fullmatch(r"error: .+\n", result.stderr), result.stderr
        assert said in result.stderr and result.stdout == ""
    else:
        assert said in result.stdout.splitlines()[-1]


def test_generate_prints_the_models_answer(results):
    assert results("greedy").stdout == results("greedy again").stdout
    answer = results("greedy").stdout.strip()
    assert answer and results("sampling").stdout.strip()
    assert results("batch").stdout.startswith(f"what? {answer}\nwhere? "), (
        "a batch answers as each prompt alone"
    )


def test_evaluate_counts_every_question(results):
    score = json.loads(results("score").stdout)
    turns = [
        turn
        for example in map(load_source("synthetic", "test").__getitem__, range(64))
        for turn in example.turns
    ]
    assert score["questions"] == len(turns)
    assert score["accuracy"] == score["correct"] / len(turns)
    yes_no = sum(answer in ("yes", "no") for _, answer in turns)
    assert (score["by_kind"]["yes/no"]["questions"], score["by_kind"]["open"]["questions"]) == (
        yes_no,
        len(turns) - yes_no,
    )
    corrupt = json.loads(results("score corrupt").stdout)
    assert corrupt["questions"] == 1 and len(corrupt["skipped"]) == 1
    assert results("score blind").stdout.startswith("blind: ")
