"""Writing two files that llama.cpp loads (`export --to gguf`), both in float32.

`model.gguf` is the language model with its tokenizer, of architecture `llama`. `mmproj.gguf` is the
vision tower with the projector, of architecture `clip` and projector type `idefics3`: SigLIP, pixel
shuffle by any factor, one matrix. Names of tensors come from the `gguf` package.

llama.cpp rotates neighbouring channels where this model rotates the two halves of a head, so the
rows of the query and key weights are interleaved. Its own image prompt (libmtmd, for idefics3)
cannot be told to leave out SmolVLM's tokens around images: see weights/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.names import language_names, vision_names
from nanovlm_fast.weights.to_transformers import chat_template

if TYPE_CHECKING:
    from gguf import GGUFWriter

LANGUAGE_FILE = "model.gguf"
VISION_FILE = "mmproj.gguf"
SUFFIXES = (".weight", ".bias")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# llama.cpp's names of what a tokenizer does to a text before its merges
PRE_TOKENIZERS = {"gpt-2": [BYTE_LEVEL], "smollm": [DIGITS, BYTE_LEVEL]}
# Of a BPE; those that are set change which tokens a text becomes
UNKNOWN_TO_LLAMA_CPP = (
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


def to_gguf(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    """Write `model.gguf` and `mmproj.gguf`.

    Raises ValueError if the `gguf` package is missing, and for what llama.cpp cannot express: a
    tokenizer other than a byte-level BPE that splits texts as GPT-2's or SmolLM's does, a
    conversation without the known template, and a vision tower with MLPs as wide as itself.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        what = "export --to gguf needs the package gguf: pip install 'nanovlm_fast[gguf]'"
        raise ValueError(what) from error
    config = model.config
    make_text(tokenizer, config, "chat")  # the tokenizer gets its tokens for images
    if config.vlm_extra_tokens and not config.lm_chat_template:
        raise ValueError(
            "a model with tokens for images (vlm_extra_tokens) and without an lm_chat_template "
            "cannot be exported to GGUF: export --to nanovlm"
        )
    # llama.cpp then takes the two matrices of an MLP for each other, as old files named them
    if config.vit_inter_dim == config.vit_hidden_dim:
        raise ValueError(
            f"a model with vit_inter_dim equal to vit_hidden_dim ({config.vit_hidden_dim}) cannot "
            "be exported to GGUF: llama.cpp would swap the matrices of its MLPs"
        )
    stored = json.loads(tokenizer.base.to_str())
    pre = pre_tokenizer(stored)
    state = {name: tensor.detach().cpu() for name, tensor in model.reference_state_dict().items()}
    _write_language(folder / LANGUAGE_FILE, config, state, (tokenizer, stored, pre))
    _write_vision(folder / VISION_FILE, config, state)


def pre_tokenizer(stored: dict[str, Any]) -> str:
    """Return llama.cpp's name for how the tokenizer in a tokenizer.json splits a text.

    Raises ValueError for one that llama.cpp would use otherwise.
    """
    model = stored["model"]
    different = [name for name in UNKNOWN_TO_LLAMA_CPP if model.get(name)]
    if stored["normalizer"]:
        different.append("normalizer")
    flags = ("lstrip", "rstrip", "single_word")
    if any(token[flag] for token in stored["added_tokens"] for flag in flags):
        different.append("added tokens that look at what is beside them")
    if model["type"] != "BPE" or different:
        what = ", ".join([model["type"], *different])
        raise ValueError(
            f"only a plain byte-level BPE can be written to GGUF, this tokenizer: {what}"
        )
    found = stored["pre_tokenizer"] or {}
    parts = found.get("pretokenizers", [found])
    for name, expected in PRE_TOKENIZERS.items():
        if len(parts) == len(expected) and all(
            wanted.items() <= part.items() for part, wanted in zip(parts, expected, strict=True)
        ):
            return name
    raise ValueError(
        "only tokenizers that split texts as GPT-2's or SmolLM's can be written to GGUF, this one: "
        + printable(json.dumps(found))
    )


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key weight (heads * D, C) in the order of llama.cpp's rotation.

    The model rotates channel i of a head with i + D / 2; llama.cpp rotates 2 i with 2 i + 1.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def language_tensors(config: VLMConfig, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the language model under Llama's names. A tied head is left out."""
    for name, theirs in language_names(config.lm_n_blocks).items():
        tensor = state[f"decoder.{name}"]
        if ".q_proj." in theirs:
            tensor = interleaved(tensor, config.lm_n_heads)
        if ".k_proj." in theirs:
            tensor = interleaved(tensor, config.lm_n_kv_heads)
        yield f"model.{theirs}", tensor
    if not config.lm_tie_weights:
        yield "lm_head.weight", state["decoder.head.weight"]


def vision_tensors(config: VLMConfig, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of tower and projector under SmolVLM's names."""
    for name, parts in vision_names(config.vit_n_blocks).items():
        tensor = state[f"vision_encoder.{name}"]
        if name.endswith("position_embedding"):
            tensor = tensor[0]  # (1, P, C) -> (P, C)
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            yield f"model.vision_model.{part}", rows
    yield "model.connector.modality_projection.proj.weight", state["MP.proj.weight"]


def _write_language(
    file: Path,
    config: VLMConfig,
    state: dict[str, Tensor],
    text: tuple[Tokenizer, dict[str, Any], str],
) -> None:
    """`text` is the tokenizer, its tokenizer.json, and what `pre_tokenizer` says of it."""
    from gguf import MODEL_ARCH, GGUFType, GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_type(GGUFType.MODEL)
    writer.add_context_length(config.lm_max_position_embeddings)
    writer.add_embedding_length(config.lm_hidden_dim)
    writer.add_block_count(config.lm_n_blocks)
    writer.add_feed_forward_length(config.lm_inter_dim)
    writer.add_head_count(config.lm_n_heads)
    writer.add_head_count_kv(config.lm_n_kv_heads)
    writer.add_layer_norm_rms_eps(config.lm_rms_eps)
    writer.add_rope_freq_base(config.lm_re_base)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.lm_vocab_size)
    _add_tokenizer(writer, config, *text)
    _finish(writer, language_tensors(config, state), MODEL_ARCH.LLAMA, config.lm_n_blocks)


def _add_tokenizer(
    writer: GGUFWriter, config: VLMConfig, tokenizer: Tokenizer, stored: dict[str, Any], pre: str
) -> None:
    from gguf import TokenType

    # Rows of the embedding that no token has
    tokens = [f"[PAD{number}]" for number in range(config.lm_vocab_size)]
    types = [TokenType.UNUSED] * len(tokens)
    for token, number in stored["model"]["vocab"].items():
        tokens[number] = token
        types[number] = TokenType.NORMAL
    for added in stored["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = stored["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # Older files of `tokenizers` hold a merge as one string
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    # Documents begin with no token of their own, so the first one is never added
    writer.add_bos_token_id(tokenizer.eos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    plain = chat_template(config.prompt, tokenizer.eos, image="")
    writer.add_chat_template(config.lm_chat_template or plain)


def _write_vision(file: Path, config: VLMConfig, state: dict[str, Tensor]) -> None:
    from gguf import MODEL_ARCH, GGUFType, GGUFWriter, VisionProjectorType

    writer = GGUFWriter(file, "clip")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(VisionProjectorType.IDEFICS3)
    writer.add_vision_projection_dim(config.lm_hidden_dim)
    writer.add_vision_image_size(config.vit_img_size)
    writer.add_vision_patch_size(config.vit_patch_size)
    writer.add_vision_embedding_length(config.vit_hidden_dim)
    writer.add_vision_feed_forward_length(config.vit_inter_dim)
    writer.add_vision_block_count(config.vit_n_blocks)
    writer.add_vision_head_count(config.vit_n_heads)
    writer.add_vision_attention_layernorm_eps(config.vit_ln_eps)
    writer.add_vision_image_mean([config.image_mean] * 3)
    writer.add_vision_image_std([config.image_std] * 3)
    writer.add_vision_use_gelu(True)  # the tanh approximation, as the model's
    writer.add_vision_projector_scale_factor(config.mp_pixel_shuffle_factor)
    writer.add_vision_preproc_image_size(config.max_img_size or config.vit_img_size)
    _finish(writer, vision_tensors(config, state), MODEL_ARCH.MMPROJ, config.vit_n_blocks)


def _finish(
    writer: GGUFWriter, tensors: Iterator[tuple[str, Tensor]], arch: Any, blocks: int
) -> None:
    """Add the tensors under the names of `arch`, and write the file."""
    from gguf import LlamaFileType, get_tensor_name_map

    names = get_tensor_name_map(arch, blocks)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for theirs, tensor in tensors:
        name = names.get_name(theirs, try_suffixes=SUFFIXES)
        if name is None:
            raise ValueError(f"the installed gguf package knows no tensor {theirs}: update it")
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
