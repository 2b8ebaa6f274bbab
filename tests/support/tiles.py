"""Small models in the layouts of nanoVLM's releases after v0.1, with tokens for images and tiles.

`GENERATIONS` are the config.json of models on the hub, with the sizes of a small one. The folders
hold what that repository's `save_pretrained` writes: config.json and model.safetensors, and no
tokenizer, which config.json names. All fields are written, as its dataclass does.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as BaseTokenizer

from nanovlm_fast import VisionLanguageModel
from nanovlm_fast.config import VLMConfig, fields_of
from nanovlm_fast.data.chat import END, START
from nanovlm_fast.data.text import EOS, Tokenizer
from nanovlm_fast.model import reference

TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
WORDS = ["user\nassistant\n what is it?", " a red cat", " two cats and three dogs"] * 9
BASE = 300  # entries of the tokenizer without the extra tokens


def token_names(side: int = 8) -> dict[str, str]:
    """The 66 special tokens of nanoVLM's models with tiles, fewer for fewer tiles per side."""
    places = [(row, column) for row in range(1, side + 1) for column in range(1, side + 1)]
    return {
        "image_token": "<|image|>",
        "global_image_token": "<|global_image|>",
        **{f"r{row}c{column}": f"<row_{row}_col_{column}>" for row, column in places},
    }


COMMON: dict[str, Any] = dict(
    vit_hidden_dim=48,
    vit_inter_dim=96,
    vit_patch_size=8,
    vit_img_size=32,
    vit_n_heads=3,
    vit_dropout=0.0,
    vit_n_blocks=2,
    vit_ln_eps=1e-6,
    vit_cls_flag=False,
    vit_model_type="google/siglip2-base-patch16-512",
    lm_hidden_dim=48,
    lm_inter_dim=80,
    lm_rms_eps=1e-5,
    lm_re_base=100000,
    lm_max_position_embeddings=2048,
    lm_n_heads=6,
    lm_n_kv_heads=2,
    lm_dropout=0.0,
    lm_n_blocks=2,
    lm_attn_scaling=1.0,
    lm_max_length=1024,
    lm_use_tokens=False,
    lm_tie_weights=True,
    lm_model_type="HuggingFaceTB/SmolLM2-360M-Instruct",
    mp_pixel_shuffle_factor=2,
    vlm_load_backbone_weights=True,
    vlm_checkpoint_path="checkpoints",
    hf_repo_name="nanoVLM",
)
LATER: dict[str, Any] = dict(
    lm_base_vocab_size=BASE,
    lm_chat_template=TEMPLATE,
    mp_image_token_length=4,
)
TILES: dict[str, Any] = dict(
    lm_vocab_size=BASE + 66,
    extra_token_amount=66,
    vlm_extra_tokens=token_names(),
    max_img_size=128,
    resize_to_max_side_len=True,
)
WIDER = dict(lm_hidden_dim=64, lm_inter_dim=112, lm_n_heads=8, lm_n_kv_heads=4)
GENERATIONS: dict[str, dict[str, Any]] = {
    "450M": {
        **COMMON,
        **LATER,
        "lm_vocab_size": BASE + 1,
        "extra_token_amount": 1,
        "vlm_extra_tokens": {"image_token": "<|image|>"},
    },
    "230M-8k": {**COMMON, **LATER, **TILES},
    "460M-8k": {**COMMON, **LATER, **TILES, **WIDER},
    "460M-8k, not enlarged": {**COMMON, **LATER, **TILES, **WIDER, "resize_to_max_side_len": False},
}


@cache
def _stored() -> str:
    made = Tokenizer.train(WORDS, BASE, special=(EOS, START, END))
    missing = BASE - len(made)
    made.base.add_tokens([f"filler{number}" for number in range(missing)])
    return made.base.to_str()


def plain_tokenizer() -> Tokenizer:
    """A tokenizer of BASE entries that ends with <|im_end|>, without the extra tokens."""
    return Tokenizer(BaseTokenizer.from_str(_stored()), END)


def write_generation(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Write FOLDER/model and the FOLDER/tokenizer that it names; return its config.json."""
    values = {**GENERATIONS[name], "lm_tokenizer": str(folder / "tokenizer"), **changes}
    torch.manual_seed(0)
    plain = reference.VisionLanguageModel(VLMConfig(**fields_of(VLMConfig, values)))
    for parameter in plain.parameters():  # far from uniform answers
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    (folder / "model").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    state = {key: tensor.detach().clone() for key, tensor in plain.state_dict().items()}
    del state["decoder.head.weight"]  # safetensors refuses two names of one memory
    save_file(state, folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(values, indent=4))
    plain_tokenizer().save(folder / "tokenizer")
    return values


def load_generation(folder: Path, name: str) -> tuple[VisionLanguageModel, Tokenizer]:
    """Model and tokenizer of a folder written for this."""
    from nanovlm_fast.weights.pretrained import load_pretrained

    write_generation(folder, name)
    return load_pretrained(folder / "model")
