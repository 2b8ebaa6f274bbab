"""Checkpoints that hold an adapter: written, resumed, loaded with their base, and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaForCausalLM

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.export import export
from nanovlm_fast.export import main as export_main
from nanovlm_fast.generate import main as generate
from nanovlm_fast.model.fused import fused_parts
from nanovlm_fast.model.lora import LORA_A, LORA_B, is_of_adapter
from nanovlm_fast.weights.adapter import ADAPTER
from nanovlm_fast.weights.names import language_names
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support import forks
from tests.support.backbones import RUN, both
from tests.support.exports import SHAPE
from tests.support.runs import different_tensors, losses

LORA = "--lora-rank 3 --lora-alpha 9 --lr-language 0.02 --log-every 1 --workers 0"


def train(out: Path, options: str) -> None:
    result = forks.run("train.py", *RUN.split(), "--out", str(out), *options.split())
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def trained(backbones, tmp_path_factory) -> Path:
    """A run of four steps with both of its checkpoints, and the folder of its base beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(backbones, folder / "base")
    options = f"{LORA} --max-steps 4 --save-every 2 --keep-checkpoints 2 --eval-every 0"
    train(folder / "run", both(folder / "base", options))
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "copied", symlinks=True)


def test_a_checkpoint_holds_what_was_trained_and_names_its_base(trained):
    folder = trained / "run" / "last"
    names = load_file(folder / "model.safetensors").keys()
    language = {name for name in names if name.startswith("decoder.")}
    assert language and all(is_of_adapter(name) for name in language)
    assert {name.split(".")[0] for name in names} == {"decoder", "MP", "vision_encoder"}
    noted = json.loads((folder / ADAPTER).read_text())
    assert noted["rank"] == 3 and noted["alpha"] == 9.0
    assert noted["base"]["language"] == str(trained / "base" / "language")
    state = load_file(folder / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in state} - {"rng"} == {*names}


@torch.no_grad()
def test_it_is_what_peft_merges_into_the_base(trained):
    """One LoRA of a fused matrix is one of each part, with the same A and its rows of B."""
    ours, _ = load_pretrained(trained / "run")
    stored = load_file(trained / "run" / "last" / "model.safetensors")
    assert stored["decoder.blocks.0.attn.qkv_proj" + LORA_B].any()
    theirs = LlamaForCausalLM.from_pretrained(trained / "base" / "language")
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    peft = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=9, target_modules=targets))
    places = dict(peft.named_parameters())
    names = language_names(ours.config.lm_n_blocks)
    fused = fused_parts(ours.config)
    copied = 0
    for name in stored:
        if not name.endswith(LORA_A):
            continue
        layer = f"{name.removesuffix(LORA_A)}.weight"
        parts = fused.get(layer, {layer: len(stored[name.replace(LORA_A, LORA_B)])})
        rows = stored[name.replace(LORA_A, LORA_B)].split(list(parts.values()))
        for part, b in zip(parts, rows, strict=True):
            place = "base_model.model.model." + names[part.removeprefix("decoder.")]
            places[place.replace(".weight", LORA_A)].copy_(stored[name])
            places[place.replace(".weight", LORA_B)].copy_(b)
            copied += 1
    assert copied == 7 * ours.config.lm_n_blocks
    merged = peft.merge_and_unload().state_dict()
    for name, weight in ours.reference_state_dict().items():
        theirs_name = names.get(name.removeprefix("decoder."))
        if theirs_name:
            expected = merged[f"model.{theirs_name}"]
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6, msg=name)


def test_a_resumed_run_trains_bit_for_bit_as_one_that_was_not_stopped(copied):
    broken = copied / "run"
    plain = shutil.copytree(broken, copied / "plain", symlinks=True)
    shutil.rmtree(broken / "checkpoints" / "step-000004")
    log = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(log))
    train(broken, "--resume")
    assert losses(broken) == losses(plain)
    assert different_tensors(broken, plain) == []


def test_a_frozen_tower_that_was_trained_before_stays_in_the_checkpoint(copied):
    run = copied / "run"
    before = load_file(run / "last" / "model.safetensors")
    train(run, "--resume --max-steps 5 --lr-vision 0")
    after = load_file((run / "last").resolve() / "model.safetensors")
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == name.startswith("vision_encoder."), name


def test_it_answers_and_other_runs_start_from_it(trained, capsys, tmp_path):
    assert generate(["--checkpoint", str(trained / "run"), "--image", SHAPE, "--prompt", "?"]) == 0
    options = f"--start-from {trained / 'run'} --mp-pixel-shuffle-factor 2 --max-steps 1"
    train(tmp_path / "again", f"{options} {LORA}")
    base = json.loads((tmp_path / "again" / "last" / ADAPTER).read_text())["base"]
    # The checkpoint by name: the run may go on.
    assert Path(base["start_from"]).name == "step-000004"
    assert load_pretrained(tmp_path / "again")[0].config.lm_vocab_size > 0


@torch.no_grad()
def test_it_is_exported_merged_and_only_when_asked(trained, tmp_path, capsys):
    options = ["--checkpoint", str(trained / "run"), "--to", "transformers"]
    assert export_main([*options, "--out", str(tmp_path / "not")]) == 1
    assert "--merge writes its base" in capsys.readouterr().err
    assert not (tmp_path / "not").exists()
    assert export_main([*options, "--merge", "--out", str(tmp_path / "merged")]) == 0
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    ours = load_pretrained(trained / "run")[0].reference_state_dict()
    weight = "model.text_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(theirs[weight], ours["decoder.blocks.0.mlp.up_proj.weight"])
    export(trained / "run", "nanovlm", tmp_path / "nanovlm", merge=True)
    again = load_pretrained(tmp_path / "nanovlm")[0].reference_state_dict()
    language = [name for name in ours if name.startswith("decoder.")]
    assert all(torch.equal(again[name], ours[name]) for name in language)


def test_a_missing_or_changed_base_is_one_clear_error(copied, capsys):
    # The copy still names the folder of the original.
    checkpoint = copied / "run" / "last"
    noted = json.loads((checkpoint / ADAPTER).read_text())
    for name in ("vision", "language"):
        noted["base"][name] = str(copied / "base" / name)
    (checkpoint / ADAPTER).write_text(json.dumps(noted))
    ask = ["--checkpoint", str(copied / "run"), "--prompt", "?"]
    assert generate(ask) == 0
    weights = copied / "base" / "language" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    capsys.readouterr()
    assert generate(ask) == 1
    assert "whose decoder has changed since" in capsys.readouterr().err
    result = forks.run("train.py", "--resume", "--max-steps", "5", "--out", str(copied / "run"))
    assert result.returncode == 1 and "whose decoder has changed since" in result.stderr
    shutil.rmtree(copied / "base")
    assert generate(ask) == 1
    error = capsys.readouterr().err
    assert (
        f"is an adapter of {copied / 'base' / 'vision'} and" in error and "no such folder" in error
    )


def test_an_adapter_of_itself_is_an_error(copied, capsys):
    folder = copied / "run" / "last"
    note = json.loads((folder / ADAPTER).read_text())
    note["base"] |= {"start_from": str(folder), "vision": "", "language": ""}
    (folder / ADAPTER).write_text(json.dumps(note))
    assert generate(["--checkpoint", str(copied / "run"), "--prompt", "?"]) == 1
    assert "is an adapter of itself" in capsys.readouterr().err


DAMAGE = {
    "": "adapter.json",
    "{}": "is damaged: not what --lora-rank writes",
    '{"rank": 1e9}': "is damaged",
    '{"rank": 2, "alpha": NaN, "base": {"start_from": "", "vision": "", "language": "", '
    '"seed": 0}, "hashes": {"decoder": "", "vision_encoder": ""}}': "is damaged",
}


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", float("nan")), ("alpha", float("inf")), ("seed", 2**70)]
)
def test_a_number_that_no_run_wrote_is_damage(copied, field, value):
    file = copied / "run" / "last" / ADAPTER
    noted = json.loads(file.read_text())
    (noted if field in noted else noted["base"])[field] = value
    file.write_text(json.dumps(noted))
    with pytest.raises(ValueError, match=f"{ADAPTER} is damaged"):
        load_pretrained(copied / "run")


@pytest.mark.parametrize(
    "lost", ["blocks.0.mlp.down_proj.lora", "MP.", "vision_encoder.blocks.0.mlp.fc1.weight"]
)
def test_weights_that_are_missing_are_damage(copied, lost):
    weights = copied / "run" / "last" / "model.safetensors"
    held = load_file(weights)
    kept = {name: one for name, one in held.items() if lost not in name}
    assert len(kept) < len(held)
    save_file(kept, weights)
    with pytest.raises(ValueError, match=r"is damaged: no .*(down_proj|MP\.|fc1)") as error:
        load_pretrained(copied / "run")
    assert str(error.value).startswith(str(weights.resolve())), "its base has no fault"
    with pytest.raises(AssertionError, match=r"(down_proj|MP\.|fc1)\S* does not fit the model"):
        train(copied / "run", "--resume --max-steps 6")


def test_adapters_of_another_rank_are_damage(copied):
    # Merged with the note's rank they would be scaled wrongly.
    file = copied / "run" / "last" / ADAPTER
    noted = json.loads(file.read_text())
    file.write_text(json.dumps({**noted, "rank": noted["rank"] + 1}))
    with pytest.raises(ValueError, match="no adapter of rank"):
        load_pretrained(copied / "run")


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_note_is_named(copied, text, capsys):
    (copied / "run" / "last" / ADAPTER).write_text(text)
    assert generate(["--checkpoint", str(copied / "run"), "--prompt", "?"]) == 1
    assert DAMAGE[text] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"), [("lm_vocab_size", 10**9), ("vit_img_size", 2**20), ("lm_n_blocks", 10**9)]
)
def test_sizes_that_the_base_does_not_have_are_refused(copied, field, value, capsys):
    file = copied / "run" / "last" / "config.json"
    config = {**json.loads(file.read_text()), field: value}
    VLMConfig(**{field: value})  # it is a size like any other
    file.write_text(json.dumps(config))
    assert generate(["--checkpoint", str(copied / "run"), "--prompt", "?"]) == 1
    assert field.replace("_", "-") in capsys.readouterr().err.replace("_", "-")


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--shard"])
def test_two_processes_train_as_one(backbones, tmp_path, options):
    common = both(backbones, f"{LORA} --max-steps 3 --optimizer adamw --eval-every 0")
    train(tmp_path / "one", f"{common} --workers 2 --accumulate 2")
    log_file = tmp_path / "two.log"
    with log_file.open("ab") as log:
        out = ["--out", str(tmp_path / "two")]
        arguments = f"{common} --workers 1 {options}".split()
        command = ["train.py", *RUN.split(), *out, *arguments]
        assert forks.run_ranks(command, 2, log) == 0, log_file.read_text()[-3000:]
    one, two = (load_file(tmp_path / n / "last" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(LORA_B):
            assert two[name].any()
        # AdamW moves a weight that gets hardly any gradient by the gradient's sign alone.
        off = (one[name] - two[name]).norm() / one[name].norm()
        assert off < 1e-3, (name, off)
    load_pretrained(tmp_path / "two")
