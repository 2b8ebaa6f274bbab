"""Wrong input to train.py gets one clear line and loses nothing; options mean what they say."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.text import Tokenizer
from tests.support.processes import run_python
from tests.support.runs import contents, error_of, train, trainer

REFUSED = {  # options -> what the line must say
    "--preset huge": "huge.*tiny",
    "--nonsense 3": "--nonsense",
    "--data nosuch": "nosuch.*easy_vqa",
    "--data jsonl:FOLDER/nowhere": "nowhere",
    "--data jsonl:FOLDER/empty": "empty",
    "--wandb maybe": "--wandb.*maybe",
    "--max-steps x": "--max.steps.*'x'",
    "--turns never": "--turns.*'never'",
    "--vit-n-heads 5": "vit_n_heads = 5",
    "--device gpu0": "gpu0",
    "--compile False": "none.*reduce-overhead",
    "--recompute some": "norms_and_activations",
    "--attention fast": "flash_attn.*sdpa",
    "--attention flash_attn --device cpu": "CUDA device.*sdpa",
    "--vision-attention ours": "auto.*flash.*cudnn",
    "--vision-attention cudnn --device cpu": "cudnn needs a CUDA device; .*auto runs anywhere",
    "--device cuda:99": "cuda",
    "--tokens-per-batch 5": "--tokens-per-batch 5 .*synthetic/train/",
    "--lm-vocab-size 100": "--lm-vocab-size",
    "--lr-vision 0 --lr-language 0 --lr-projector 0": "learning rate",
}


@pytest.mark.parametrize("options", REFUSED)
def test_wrong_input_gets_one_clear_line_and_loses_nothing(finished, copy, options):
    empty = copy.parent / "empty"
    empty.mkdir()
    (empty / "train.jsonl").write_text("\n")
    result = train(copy, f"--overwrite {options.replace('FOLDER', str(copy.parent))}")
    error = error_of(result)
    assert re.search(REFUSED[options], error), error
    assert result.stderr.strip() == error, "one line"
    assert contents(copy) == contents(finished[0]), (
        "the run that --out holds must outlive a command that could not start"
    )


def test_a_start_that_failed_leaves_nothing_for_the_next(tmp_path):
    error_of(train(tmp_path / "run", "--tokens-per-batch 5"))
    assert contents(tmp_path) == {}, "a tokenizer left here would be taken for the next run's own"


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ("--final-eval False", "final_eval", False),
        ("--no-final-eval", "final_eval", False),
        ("--final-eval", "final_eval", True),
        ("", "final_eval", True),
        ("--wandb False", "wandb", False),
        ("--wandb", "wandb", True),
        ("--wandb no", "wandb", False),
        ("--resume False", "resume", False),
        ("--overwrite=false", "overwrite", False),
    ],
)
def test_booleans_mean_what_they_say(options, name, value):
    _, config = parse_config(options.split())
    assert getattr(config, name) is value


@pytest.mark.parametrize("spelling", ["", "True", "yes", "y", "T", "1"])
def test_resume_however_it_is_spelt_takes_the_runs_own_configuration(finished, spelling):
    model, config = parse_config(
        ["--out", str(finished[0]), "--resume", *spelling.split(), "--lr-vision", "0.5"]
    )
    assert (config.resume, config.epochs, config.tokens_per_batch, model.lm_hidden_dim) == (
        True,
        3,
        512,
        32,
    )
    assert config.lr_vision == 0.5, "what the command line says comes first"


def test_help_explains_every_field_with_its_default():
    result = run_python("train.py", "--help")
    assert result.returncode == 0, result.stderr
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", result.stdout)]
    for field in (*dataclasses.fields(VLMConfig), *dataclasses.fields(TrainConfig)):
        name = f"--{field.name.replace('_', '[-_]')}"
        (entry,) = (entry for entry in entries if re.match(rf"{name}[ ,]", entry))
        assert re.search(rf"{name.replace('[-_]', '-')}\b", entry), f"{entry}: the dashed spelling"
        words = " ".join(field.metadata["help"].split())
        assert words in entry and re.search(r"\(default: .*\)$", entry), entry


# ---- other than asked


def test_kernels_that_cannot_run_are_not_announced(loop, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    trainer(loop, tmp_path / "run", "--kernels rms_norm,swiglu --max-steps 1")
    said = capsys.readouterr().out
    assert "warning: --kernels rms_norm,swiglu: Triton kernels need a GPU" in said
    assert "kernels: none, plain PyTorch (they need a GPU: rms_norm, swiglu)" in said
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    trainer(loop, tmp_path / "other", "--kernels rms_norm --max-steps 1")
    said = capsys.readouterr().out
    assert "kernels: rms_norm" in said and "warning" not in said


def test_options_of_the_compiler_without_it_are_said_to_change_nothing(loop, tmp_path, capsys):
    for options in ("--inductor combo_kernels", "--inductor combo_kernels --compile auto"):
        trainer(loop, tmp_path / "run", f"{options} --overwrite --max-steps 1")
        said = capsys.readouterr().out
        assert "warning: --inductor combo_kernels changes nothing: the model is not" in said
    trainer(loop, tmp_path / "run", "--inductor none --overwrite --max-steps 1")
    assert "warning" not in capsys.readouterr().out


def test_a_run_says_and_keeps_which_attention_its_vision_tower_has(finished):
    out, result = finished
    assert "vision attention: sdpa" in result.stdout
    assert json.loads((out / "config.json").read_text())["vision_attention"] == "auto"
    options = ["--out", str(out), "--resume", "--vision-attention", "cudnn"]
    assert parse_config(options)[1].vision_attention == "cudnn", "it may change on a resume"


def test_embeddings_keep_the_tokenizer_that_they_were_trained_with(finished, tmp_path, capsys):
    run = finished[0]
    Tokenizer.train(["another vocabulary, of the same size"] * 9, 384).save(tmp_path)
    with pytest.raises(SystemExit):
        parse_config(["--start-from", str(run), "--lm-tokenizer", str(tmp_path)])
    error = capsys.readouterr().err.strip()
    assert (
        re.search(rf"--lm-tokenizer {tmp_path}: \d+ of \d+ ids mean something else", error)
        and "\n" not in error
    )
    more = Tokenizer.load(run)
    more.base.add_tokens(["<more>"])
    more.save(tmp_path)
    for given, rows in ((run, 384), (tmp_path, 400)):
        options = [
            "--start-from",
            str(run),
            "--lm-tokenizer",
            str(given),
            "--lm-vocab-size",
            str(rows),
        ]
        assert parse_config(options)[0].lm_tokenizer == str(given)


def test_weights_without_the_tokenizer_that_was_made_for_them_need_one(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "last", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["lm_tokenizer"] == "train"
    with pytest.raises(SystemExit):
        parse_config(["--start-from", str(tmp_path / "model")])
    assert "--lm-tokenizer train: pretrained embeddings mean nothing" in capsys.readouterr().err
    options = ["--start-from", str(tmp_path / "model"), "--lm-tokenizer", str(finished[0])]
    assert parse_config(options)[0].lm_tokenizer == str(finished[0])
