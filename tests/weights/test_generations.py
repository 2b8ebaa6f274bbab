"""Checkpoints of nanoVLM's releases after v0.1 are read, and written for its own code to read.

Ids of the extra tokens come from `transformers`, which that code asks for them.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nanovlm_fast import export as exporting
from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.pretrained import load_model, load_pretrained
from tests.support import forks
from tests.support.backbones import start
from tests.support.tiles import BASE, GENERATIONS, plain_tokenizer, token_names, write_generation


@pytest.fixture(params=list(GENERATIONS))
def generation(request) -> str:
    return request.param


def their_ids(folder: Path, values: dict) -> list[int]:
    """Ids of the extra tokens in the tokenizer as main's code makes it."""
    theirs = AutoTokenizer.from_pretrained(
        values["lm_tokenizer"],
        use_fast=True,
        extra_special_tokens=values["vlm_extra_tokens"],
        chat_template=values["lm_chat_template"],
    )
    return theirs.convert_tokens_to_ids(list(values["vlm_extra_tokens"].values()))


def test_a_folder_of_each_release_is_read_in_full(tmp_path, generation):
    values = write_generation(tmp_path, generation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all its fields are known
        model, tokenizer = load_pretrained(tmp_path / "model")
    for field in dataclasses.fields(VLMConfig):
        if field.name in values:
            assert getattr(model.config, field.name) == values[field.name], field.name
    ours = model.config
    assert ours.max_img_size == values.get("max_img_size", 0)
    assert model.extra_config == {k: v for k, v in values.items() if not hasattr(ours, k)}
    stored = load_file(tmp_path / "model" / "model.safetensors")
    state = model.reference_state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    added = [tokenizer.base.token_to_id(text) for text in values["vlm_extra_tokens"].values()]
    assert added == list(range(BASE, values["lm_vocab_size"])) == their_ids(tmp_path, values)
    assert tokenizer.eos == "<|im_end|>"


# The fields of VLMConfig in nanoVLM's main (models/config.py); its constructor takes no others.
MAIN = {*GENERATIONS["460M-8k"], "lm_tokenizer"}


@pytest.mark.parametrize("trap", [{}, {"lm_eos_token_id": 2, "nosuch": [1]}])
@pytest.mark.filterwarnings("ignore:.*fields not used here. nosuch")
def test_it_goes_back_as_it_was(tmp_path, generation, trap):
    """v0.1's lm_eos_token_id, which the releases after it do not take, is left out."""
    values = write_generation(tmp_path, generation, **trap)
    out = tmp_path / "out"
    options = ["--checkpoint", str(tmp_path / "model"), "--to", "nanovlm", "--out", str(out)]
    assert exporting.main(options) == 0
    written = json.loads((out / "config.json").read_text())
    assert written.keys() <= MAIN
    expected = {key: value for key, value in values.items() if key not in trap}
    assert written == {**expected, "lm_tokenizer": str(out)}
    assert list(written["vlm_extra_tokens"]) == list(values["vlm_extra_tokens"])
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The exported folder has the tokenizer with the tokens in it, at the same ids
    assert their_ids(out, written) == list(range(BASE, values["lm_vocab_size"]))


@pytest.mark.filterwarnings("ignore:.*fields not used here. nosuch")
def test_what_is_not_known_stays_in_our_own_layout(tmp_path, generation):
    values = write_generation(tmp_path, generation, nosuch=[1], lm_eos_token_id=2)
    model, tokenizer = load_pretrained(tmp_path / "model")
    save_pretrained(tmp_path / "ours", model, tokenizer)
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: stored[key] for key in values if key != "lm_tokenizer"} == {
        key: value for key, value in values.items() if key != "lm_tokenizer"
    }
    again, text = load_pretrained(tmp_path / "ours")
    assert again.extra_config == model.extra_config
    assert text.fingerprint == tokenizer.fingerprint
    assert dataclasses.replace(again.config, lm_tokenizer="") == dataclasses.replace(
        model.config, lm_tokenizer=""
    )


def test_unknown_fields_are_warned_of(tmp_path):
    write_generation(tmp_path, "450M", nosuch=[1])
    with pytest.warns(UserWarning, match="fields not used here: nosuch$"):
        load_model(tmp_path / "model")


def without(name: str) -> dict[str, str]:
    return {key: text for key, text in token_names().items() if key != name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mp_image_token_length": 64}, "mp_image_token_length = 64, and its sizes give 4"),
        ({"vlm_extra_tokens": without("r1c1")}, "needs a token for r1c1 in vlm_extra_tokens"),
        ({"vlm_extra_tokens": ["<|image|>"]}, "vlm_extra_tokens must be of type TokenNames"),
        ({"vlm_extra_tokens": {"image_token": 3}}, "vlm_extra_tokens must be of type TokenNames"),
        ({"max_img_size": 32 * 9}, "9 x 9 tiles .* at most 8 x 8"),
        ({"max_img_size": 100}, "max_img_size = 100 must be a positive multiple of vit_img_size"),
        ({"max_img_size": "128"}, "max_img_size must be of type int"),
        ({"lm_chat_template": None}, "lm_chat_template must be of type str"),
        ({"vit_cls_flag": True}, "vit_cls_flag = True, only False is supported"),
    ],
)
def test_models_that_are_not_ours_are_refused_by_name(tmp_path, changes, message):
    write_generation(tmp_path, "230M-8k")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message) as refusal:
        load_pretrained(tmp_path / "model")
    assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_tokenizer_with_other_entries_is_refused(tmp_path):
    write_generation(tmp_path, "230M-8k")
    larger = plain_tokenizer()
    larger.base.add_tokens(["one more"])
    (tmp_path / "larger").mkdir()
    larger.save(tmp_path / "larger")
    with pytest.raises(ValueError, match="367 ids, with 66 extra tokens, the model 366"):
        load_pretrained(tmp_path / "model", lm_tokenizer=str(tmp_path / "larger"))


def test_a_run_starts_from_one(tmp_path):
    values = write_generation(tmp_path, "460M-8k")
    model, _ = parse_config(["--start-from", str(tmp_path / "model")])
    for name in ("max_img_size", "vlm_extra_tokens", "lm_chat_template", "lm_vocab_size"):
        assert getattr(model, name) == values[name]
    assert list(model.vlm_extra_tokens) == list(values["vlm_extra_tokens"])


def test_backbones_get_rows_for_the_tokens_of_a_preset(backbones):
    """New rows are drawn as nanoVLM draws them: N(0, 0.02)."""
    places = f"--vision {backbones / 'vision'} --language {backbones / 'language'}"
    sizes = "--vit-img-size 32 --max-img-size 256 --mp-pixel-shuffle-factor 2"
    packed, _ = start(f"--preset nanovlm-230m {places} {sizes}")
    trained = load_file(backbones / "language" / "model.safetensors")["model.embed_tokens.weight"]
    table = packed.decoder.token_embedding.weight.detach()
    assert len(table) == len(trained) + 66 == packed.config.lm_vocab_size
    assert torch.equal(table[:-66], trained)
    assert packed.decoder.head.weight is packed.decoder.token_embedding.weight
    new = table[-66:]  # 3,168 numbers
    assert new.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(new.mean().item()) < 0.002


@pytest.mark.slow
def test_one_trains_on_and_goes_back(tmp_path):
    """train.py from its folder, on pictures cut into tiles; the run's export is as the folder."""
    values = write_generation(tmp_path, "230M-8k")
    options = "--data synthetic:32 --turns chat --device cpu --max-steps 2 --tokens-per-batch 2048"
    options += " --look-ahead 8 --val-samples 4 --no-final-eval --workers 0"
    place = f"--start-from {tmp_path / 'model'} --out {tmp_path / 'run'}"
    result = forks.run(*f"train.py {place} {options}".split())
    assert result.returncode == 0, result.stderr
    assert "UserWarning" not in result.stderr
    out = tmp_path / "out"
    options = ["--checkpoint", str(tmp_path / "run"), "--to", "nanovlm", "--out", str(out)]
    assert exporting.main(options) == 0
    written = json.loads((out / "config.json").read_text())
    assert written == {**values, "lm_tokenizer": str(out)}
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert {name: t.shape for name, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert not torch.equal(before["MP.proj.weight"], after["MP.proj.weight"])
    assert their_ids(out, written) == list(range(BASE, values["lm_vocab_size"]))
