"""nanoVLM v0.1's layout is read and written."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nanovlm_fast import VisionLanguageModel
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.model import reference
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.pretrained import load_pretrained
from nanovlm_fast.weights.to_nanovlm import to_nanovlm
from tests.support import forks
from tests.support.exports import (
    CONFIGS,
    SHAPE,
    ask,
    random_model,
    reference_logits,
)
from tests.support.samples import SMALL

# The fields of VLMConfig in nanoVLM v0.1 (models/config.py); its constructor takes no others.
V01 = (
    "vit_hidden_dim vit_inter_dim vit_patch_size vit_img_size vit_n_heads vit_dropout "
    "vit_n_blocks vit_ln_eps vit_cls_flag vit_model_type lm_hidden_dim lm_inter_dim lm_rms_eps "
    "lm_re_base lm_max_position_embeddings lm_vocab_size lm_n_heads lm_n_kv_heads lm_dropout "
    "lm_n_blocks lm_attn_scaling lm_max_length lm_use_tokens lm_tie_weights lm_model_type "
    "lm_tokenizer lm_eos_token_id mp_pixel_shuffle_factor vlm_load_backbone_weights "
    "vlm_checkpoint_path"
).split()
NanoVLMConfig = dataclasses.make_dataclass("VLMConfig", [(name, object, None) for name in V01])
V01_EXTRA = dict(  # what v0.1 itself writes beyond the fields that are ours too
    vit_dropout=0.0,
    vit_cls_flag=False,
    vit_model_type="google/siglip-base-patch16-224",
    lm_dropout=0.0,
    lm_attn_scaling=1.0,
    lm_eos_token_id=0,
    lm_use_tokens=False,
    lm_model_type="HuggingFaceTB/SmolLM2-135M",
    vlm_load_backbone_weights=True,
    vlm_checkpoint_path="checkpoints/nanoVLM-222M",
)


@pytest.mark.parametrize("name", ["tiny", "untied, normalised, full vocabulary"])
@pytest.mark.filterwarnings("ignore:nanoVLM's prompt")
def test_nanovlm_loads_what_is_written_for_it(tmp_path, tokenizer, name):
    """Load as its from_pretrained does: fields as keywords, strict load_model, plain pixels."""
    config = CONFIGS[name]
    model = random_model(config)
    to_nanovlm(tmp_path, model, tokenizer)
    theirs = NanoVLMConfig(**json.loads((tmp_path / "config.json").read_text()))
    assert (theirs.vit_hidden_dim, theirs.lm_n_kv_heads) == (
        config.vit_hidden_dim,
        config.lm_n_kv_heads,
    )
    plain = reference.VisionLanguageModel(
        config
    )  # its keys and semantics are v0.1's (test_reference.py)
    safetensors.torch.load_model(plain, tmp_path / "model.safetensors", strict=True)
    _, prompt, pixels = ask(model, tokenizer, [SHAPE])
    ids = torch.from_numpy(prompt.input_ids[prompt.image_rows < 0])[None]
    with torch.no_grad():
        logits = plain(ids, pixels.float()[None] / 255)[0][0]
    torch.testing.assert_close(
        logits, reference_logits(model, prompt, pixels), rtol=1e-4, atol=1e-4
    )


def test_another_prompt_than_nanovlms_is_pointed_out(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="nanoVLM's prompt"):
        to_nanovlm(
            tmp_path, random_model(CONFIGS["untied, normalised, full vocabulary"]), tokenizer
        )


@pytest.mark.filterwarnings("ignore:nanoVLM's prompt")
def test_a_model_saves_itself_in_nanovlms_layout(tmp_path, tokenizer):
    model = random_model(CONFIGS["untied, normalised, full vocabulary"])
    model.save_pretrained(tmp_path / "new" / "folder", layout="nanovlm", tokenizer=tokenizer)
    to_nanovlm(tmp_path / "expected", model, tokenizer)
    files = {
        place: {file.name: file.read_bytes() for file in place.iterdir()}
        for place in (tmp_path / "new" / "folder", tmp_path / "expected")
    }
    written, expected = files.values()
    assert written == expected and "tokenizer.json" in written
    again = VisionLanguageModel.from_pretrained(tmp_path / "new" / "folder")
    _, prompt, pixels = ask(model, tokenizer, [SHAPE])
    logits = reference_logits(again, prompt, pixels)
    torch.testing.assert_close(
        logits, reference_logits(model, prompt, pixels), rtol=1e-4, atol=1e-4
    )


@pytest.fixture
def nanovlm(tmp_path) -> tuple[Path, reference.VisionLanguageModel]:
    """A folder as nanoVLM v0.1's save_pretrained writes it: save_model, and no tokenizer."""
    config = VLMConfig(**{**SMALL, "lm_vocab_size": 281, "image_mean": 0.0, "image_std": 1.0})
    plain = reference.VisionLanguageModel(config)
    folder = tmp_path / "nanovlm"
    folder.mkdir()
    safetensors.torch.save_model(plain, str(folder / "model.safetensors"))
    values = {name: value for name, value in vars(config).items() if name in V01}
    (folder / "config.json").write_text(json.dumps({**values, **V01_EXTRA}, indent=4))
    return folder, plain


def test_a_nanovlm_checkpoint_loads_and_goes_back_as_it_was(tmp_path, tokenizer, nanovlm):
    folder, plain = nanovlm
    tokenizer.save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all its fields are known
        model, _ = load_pretrained(folder)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.reference_state_dict()[name], tensor), name
    reply, _, _ = ask(model.eval(), tokenizer, [SHAPE], n=4)
    assert len(reply) == 4
    (tmp_path / "back").mkdir()
    to_nanovlm(tmp_path / "back", model, tokenizer)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    before, after = (
        safetensors.torch.load_file(place / "model.safetensors")
        for place in (folder, tmp_path / "back")
    )
    embedding = {
        "decoder.head.weight",
        "decoder.token_embedding.weight",
    }  # one of the two names in either file
    assert before.keys() - embedding == after.keys() - embedding
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - embedding)
    save_pretrained(tmp_path / "ours", model, tokenizer)
    assert load_pretrained(tmp_path / "ours")[0].extra_config == V01_EXTRA, (
        "kept in our own layout too"
    )


def test_a_nanovlm_checkpoint_generates_and_trains_on_by_its_hub_name(tmp_path, tokenizer, nanovlm):
    """From the cache in the hub's own layout, without a network."""
    tokenizer.save(nanovlm[0])
    repository = tmp_path / "home" / "hub" / "models--lusxvr--nanoVLM-222M"
    shutil.copytree(nanovlm[0], repository / "snapshots" / ("b" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    env = dict(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    command = "-m nanovlm_fast.generate --checkpoint lusxvr/nanoVLM-222M --prompt what?"
    command += " --max-new-tokens 3"
    result = forks.run(*command.split(), **env)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    options = "--data synthetic:32 --device cpu --max-steps 2 --tokens-per-batch 512"
    options += " --look-ahead 16 --no-final-eval"
    out = tmp_path / "run"
    command = f"train.py --start-from lusxvr/nanoVLM-222M {options} --out {out}"
    result = forks.run(*command.split(), **env)
    assert result.returncode == 0, result.stderr
    assert (
        "UserWarning" not in result.stderr and load_pretrained(out)[0].config.vit_hidden_dim == 48
    )
