"""Model folders from and for elsewhere: what is refused, and which tokenizer is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nanovlm_fast import VisionLanguageModel
from nanovlm_fast import evaluate as evaluating
from nanovlm_fast import export as exporting
from nanovlm_fast import generate as generating
from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.export import export
from nanovlm_fast.model import reference
from nanovlm_fast.packing.batch import pack
from nanovlm_fast.packing.documents import Document, Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.training.checkpoint import save_checkpoint
from nanovlm_fast.weights import to_nanovlm
from nanovlm_fast.weights.backbones import language_fields, vision_fields
from nanovlm_fast.weights.folder import FIELDS_AFTER_V01, save_pretrained
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support.samples import SMALL

CONFIG = VLMConfig(**{**SMALL, "lm_vocab_size": 300, "image_mean": 0.0, "image_std": 1.0})
V01 = dict(  # what nanoVLM v0.1 writes into config.json beyond our fields
    vit_dropout=0.0,
    vit_cls_flag=False,
    vit_model_type="google/siglip-base-patch16-224",
    lm_dropout=0.0,
    lm_attn_scaling=1.0,
    lm_use_tokens=False,
    lm_model_type="HuggingFaceTB/SmolLM2-135M",
    lm_eos_token_id=0,
    vlm_load_backbone_weights=True,
    vlm_checkpoint_path="checkpoints/nanoVLM-222M",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Question: what is it? Answer:", " a red cat", " two cats"] * 9, 290)


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A folder as nanoVLM v0.1 writes it, without fields that only we have, and a tokenizer."""
    torch.manual_seed(0)
    save_pretrained(tmp_path / "model", VisionLanguageModel(CONFIG), tokenizer)
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    for name in ("image_mean", "image_std", "init", "prompt"):
        del values[name]
    file.write_text(json.dumps({**values, **V01}))
    return tmp_path / "model"


def change(folder: Path, **fields: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def error_of(command, arguments: list[str], capsys) -> str:
    """The one line with which the command ends."""
    assert command(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---- other models of nanoVLM's


def test_a_genuine_v01_checkpoint_is_known_in_full(folder, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(change(folder, hf_repo_name="nanoVLM"))
        assert generating.main(["--checkpoint", str(folder), "--prompt", "what?"]) == 0
        assert parse_config(["--start-from", str(folder)])[0].vit_hidden_dim == 48
    with pytest.warns(UserWarning, match="fields not used here: nosuch$"):
        _, tokenizer = load_pretrained(change(folder, nosuch=1))
        model = VisionLanguageModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "back", layout="nanovlm", tokenizer=tokenizer)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    left_out = {*to_nanovlm.OWN_FIELDS, *FIELDS_AFTER_V01}
    ours_too = vars(CONFIG).keys() - left_out
    assert written.keys() == V01.keys() | ours_too, "v0.1's constructor takes no others"


OTHER_VALUES = dict(
    vit_dropout=0.1,
    vit_cls_flag=True,
    lm_dropout=0.05,
    lm_attn_scaling=2.0,
    lm_use_tokens=True,
)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_field_that_makes_another_function_is_refused(folder, name):
    with pytest.raises(ValueError, match=f"{name} = .* is supported"):
        load_pretrained(change(folder, **{name: OTHER_VALUES[name]}))
    with pytest.raises(ValueError, match=f"{name} = None, only .* is supported"):
        load_pretrained(change(folder, **{name: None}))


def test_a_folder_of_transformers_is_named(folder):
    values = {"model_type": "smolvlm", "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"of transformers \(model_type 'smolvlm'\): only"):
        load_pretrained(folder)


def test_rotary_frequencies_that_contradict_the_configuration_are_refused(folder, capsys):
    with pytest.raises(ValueError, match=r"inv_freq is not what lm_re_base = 10000\.0 gives"):
        load_pretrained(change(folder, lm_re_base=10000.0))
    change(folder, lm_re_base=CONFIG.lm_re_base)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, file)
    model, _ = load_pretrained(folder)  # rounding is no contradiction
    exact = VisionLanguageModel(CONFIG).decoder.rotary_embd.inv_freq
    assert torch.equal(model.decoder.rotary_embd.inv_freq, exact)
    tensors["decoder.rotary_embd.inv_freq"] *= 0.5  # scaled positions
    save_file(tensors, file)
    command = ["--checkpoint", str(folder), "--prompt", "what?"]
    assert "inv_freq" in error_of(generating.main, command, capsys)


# ---- positions


@pytest.mark.parametrize("length", [32, 33, 40])
def test_positions_past_the_table_are_an_error(length):
    config = dataclasses.replace(CONFIG, lm_max_position_embeddings=32)
    packed, plain = VisionLanguageModel(config), reference.VisionLanguageModel(config)
    ids = torch.arange(length)
    document = Document(ids.numpy(), np.full(length, -1, np.int32), ids.numpy(), "")
    sample = Sample("a", np.zeros((0, 3, 32, 32), np.uint8), [document])
    batch = pack([sample], Budget(40, 3, 0, 40, 40), config.image_tokens, config.vit_img_size)
    if length == 32:  # the padding of 8 has positions of its own
        assert packed.logits(batch).isfinite().all() and plain(ids[None], None)[0].isfinite().all()
    else:
        with pytest.raises(ValueError, match=f"{length} tokens.*lm_max_position_embeddings is 32"):
            packed(batch)
        with pytest.raises(ValueError, match=f"{length} tokens.*lm_max_position_embeddings is 32"):
            plain(ids[None], None)
    if length == 40:  # a padded row may be longer than what it holds
        mask = (ids < 30).long()[None]
        assert plain(ids[None], None, mask)[0].isfinite().all()


# ---- backbones


def backbone(folder: Path, kind: str, **fields: object) -> str:
    folder.mkdir(exist_ok=True)
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=6)
    if kind == "llama":
        sizes |= dict(num_key_value_heads=2)
    else:
        sizes |= dict(image_size=32, patch_size=8)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **sizes, **fields}))
    return str(folder)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "llama"])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(attention_dropout=0.1), "attention_dropout is 0.1"),
        (dict(quantization_config={"bits": 4}), "quantised"),
    ],
)
def test_backbones_whose_fields_make_another_function_are_refused(tmp_path, kind, fields, said):
    read = language_fields if kind == "llama" else vision_fields
    assert read(backbone(tmp_path / "plain", kind))
    with pytest.raises(ValueError, match=said):
        read(backbone(tmp_path / "other", kind, **fields))


def test_a_towers_normalisation_is_the_one_that_it_ships_with(tmp_path):
    def fields(**values: object) -> tuple[float, float]:
        file.write_text(json.dumps(values))
        read = vision_fields(name)
        return read["image_mean"], read["image_std"]

    name = backbone(tmp_path / "tower", "siglip_vision_model")
    file = tmp_path / "tower" / "preprocessor_config.json"
    assert fields() == (0.5, 0.5)
    file.unlink()
    assert vision_fields(name)["image_mean"] == 0.5
    plain = dict(image_mean=[0.4] * 3, image_std=[0.25] * 3, rescale_factor=0.00392156862745098)
    assert fields(**plain) == (0.4, 0.25)
    assert fields(do_normalize=False, image_mean=[0.4] * 3) == (0.0, 1.0)
    for wrong in (
        dict(image_mean=[0.48, 0.46, 0.41]),
        dict(rescale_factor=1.0),
        dict(do_rescale=False),
        dict(image_std=["x"]),
        dict(rescale_factor=None),
    ):
        with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
            fields(**wrong)


# ---- tokenizers


def ids_of(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("what is a red cat?")


def test_a_folder_without_its_tokenizer_says_so_at_once(tmp_path, capsys, tokenizer):
    """The hub is not asked for a tokenizer named 'train', nor for a path."""
    model = VisionLanguageModel(dataclasses.replace(CONFIG, lm_tokenizer="train"))
    model.save_pretrained(tmp_path / "bare")
    assert VisionLanguageModel.from_pretrained(tmp_path / "bare").config == model.config
    prompt = ["--checkpoint", str(tmp_path / "bare"), "--prompt", "what?", "--max-new-tokens", "2"]
    for name in ("train", "/gone/run", "../gone", "a/b/c", "~nobody-here/run"):
        change(tmp_path / "bare", lm_tokenizer=name)
        started = time.monotonic()
        said = error_of(generating.main, prompt, capsys)
        assert "without its tokenizer" in said and name in said and "--lm-tokenizer" in said
        assert time.monotonic() - started < 5
    for wrong in ("train", "/gone/tokenizer", "~nobody-here/run", str(tmp_path)):
        assert wrong in error_of(generating.main, [*prompt, "--lm-tokenizer", wrong], capsys)
    tokenizer.save(tmp_path)
    assert generating.main([*prompt, "--lm-tokenizer", str(tmp_path)]) == 0
    options = ["--checkpoint", str(tmp_path / "bare"), "--lm-tokenizer", str(tmp_path)]
    assert evaluating.main([*options, "--data", "synthetic:8"]) == 0
    assert exporting.main([*options, "--to", "nanovlm", "--out", str(tmp_path / "out")]) == 0
    assert ids_of(load_pretrained(tmp_path / "out")[1]) == ids_of(tokenizer)


def test_a_tokenizer_that_is_named_goes_before_the_folders_own(folder, tmp_path, tokenizer):
    other = Tokenizer.train(["what is a blue dog"] * 9, 270)
    other.save(tmp_path)
    assert ids_of(other) != ids_of(tokenizer)
    assert ids_of(load_pretrained(folder)[1]) == ids_of(tokenizer)
    model, loaded = load_pretrained(folder, lm_tokenizer=str(tmp_path))
    assert ids_of(loaded) == ids_of(other) and model.config.lm_tokenizer == str(tmp_path)


def test_what_is_written_holds_after_a_move(tmp_path, monkeypatch, tokenizer):
    """A run whose tokenizer came from a relative path is moved, and that folder is deleted."""
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir()
    tokenizer.save(Path("made"))
    model = VisionLanguageModel(dataclasses.replace(CONFIG, lm_tokenizer="made"))
    save_checkpoint(Path("run"), model, tokenizer, [], {"step": 1, "best_step": 1})
    save_pretrained(Path("bare"), model)  # found from anywhere while it exists
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ids_of(load_pretrained(tmp_path / "bare")[1]) == ids_of(tokenizer)
    shutil.rmtree(tmp_path / "made")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    for place in (tmp_path / "moved", Path("../moved/best")):
        loaded, own = load_pretrained(place)
        assert ids_of(own) == ids_of(tokenizer)
        assert loaded.config.lm_tokenizer == "train"


@pytest.mark.parametrize("start", ["train", "a folder"])
def test_nanovlm_can_load_the_tokenizer_that_its_layout_names(
    tmp_path, monkeypatch, capsys, tokenizer, start
):
    """By the name in config.json alone and from another directory, as v0.1's get_tokenizer does."""
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir()
    tokenizer.save(Path("made"))
    name = "made" if start == "a folder" else start
    model = VisionLanguageModel(dataclasses.replace(CONFIG, lm_tokenizer=name))
    save_checkpoint(Path("run"), model, tokenizer, [], {"step": 1, "best_step": 1})
    model.save_pretrained("saved", layout="nanovlm", tokenizer=tokenizer)
    command = ["--checkpoint", "run", "--to", "nanovlm", "--out", "exported"]
    assert exporting.main(command) == 0
    assert capsys.readouterr().out.endswith("--push writes the hub's name\n")
    export("run", "nanovlm", Path("pushed"), "someone/cats")
    with pytest.raises(ValueError, match=r"give it \(tokenizer=\)"):
        model.save_pretrained("bare", layout="nanovlm")
    assert not Path("bare").exists()
    shutil.rmtree("made")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in ("saved", "exported"):
        named = json.loads((tmp_path / folder / "config.json").read_text())["lm_tokenizer"]
        theirs = AutoTokenizer.from_pretrained(named)
        assert theirs("what is a red cat?").input_ids == ids_of(tokenizer)
    pushed = tmp_path / "pushed"
    assert json.loads((pushed / "config.json").read_text())["lm_tokenizer"] == "someone/cats"
    card = (pushed / "README.md").read_text()
    assert "in `config.json`, `someone/cats`." in card and "If the folder moves" not in card
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "If the folder moves, write its new place" in card
    assert str(tmp_path) not in card, "no path of this machine"
    assert ids_of(load_pretrained(shutil.move(pushed, tmp_path / "moved"))[1]) == ids_of(tokenizer)


def test_a_source_is_named_so_that_it_is_found_from_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = parse_config(["--start-from", "model"])
    assert model.lm_tokenizer == str(tmp_path / "model")
    backbone(tmp_path / "language", "llama")
    assert language_fields("language")["lm_tokenizer"] == str(tmp_path / "language")
