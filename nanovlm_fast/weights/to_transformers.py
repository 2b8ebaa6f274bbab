"""Writing a folder that transformers loads without remote code (`export --to transformers`).

transformers' SmolVLM architecture (Marafioti et al., 2025) is the same function as this model:
SigLIP tower, pixel shuffle, linear projector, Llama decoder. SmolVLM's own processor puts tokens
around an image that this model was never trained on; the processor written here repeats `<image>`
and nothing else. See weights/README.md for two details in which transformers differs.

Models with tiles are exported with a tokenizer and without a processor: see tiled_usage.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.chat import make_text
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.names import LANGUAGE_FIELDS, VISION_FIELDS, language_names, vision_names

IMAGE_TOKEN = "<image>"


def to_transformers(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    """Write model, tokenizer, image processor and chat template.

    They are read by AutoModelForImageTextToText and AutoProcessor. Raises ValueError for what
    transformers' classes cannot express: a tokenizer that adds tokens of its own or that has an
    entry `<image>`, and numbers of patches for which SmolVLM rounds positions wrongly.
    """
    from transformers import GenerationConfig, SmolVLMForConditionalGeneration

    config = model.config
    tiled = bool(config.vlm_extra_tokens)
    wrapped = (
        conversation_tokenizer(tokenizer, config) if tiled else transformers_tokenizer(tokenizer)
    )
    image_token = config.vlm_extra_tokens["image_token"] if tiled else IMAGE_TOKEN
    image_id = wrapped.convert_tokens_to_ids(image_token)
    rows = max(config.lm_vocab_size, image_id + 1)  # the embedding may be full
    theirs = SmolVLMForConditionalGeneration(
        transformers_config(config, rows, image_id, tokenizer.eos_id)
    )
    state = transformers_state(model, rows)
    if tiled:
        start_pixels_above_zero(state, config)
    theirs.load_state_dict(state)
    check_positions(theirs.model.vision_model.embeddings, config)
    eos = tokenizer.eos_id
    # The row of `<image>` is zero, hence its logit 0, which may be the largest: it is suppressed.
    # That of a model with tiles has been trained as any other.
    suppressed = None if tiled else [image_id]
    theirs.generation_config = GenerationConfig(
        eos_token_id=eos, pad_token_id=eos, suppress_tokens=suppressed
    )
    theirs.save_pretrained(folder)
    if tiled:
        wrapped.save_pretrained(folder)
    else:
        transformers_processor(config, wrapped, tokenizer.eos).save_pretrained(folder)


def conversation_tokenizer(tokenizer: Tokenizer, config: VLMConfig) -> Any:
    """Return a PreTrainedTokenizerFast with the model's chat template and names for its tokens.

    Raises ValueError for a model without the one template that conversations are written with.
    """
    from tokenizers import Tokenizer as BaseTokenizer
    from transformers import PreTrainedTokenizerFast

    make_text(tokenizer, config, "chat")  # raises for another template, or none of its tokens
    if not config.lm_chat_template:
        raise ValueError(
            "a model with tokens for images (vlm_extra_tokens) and without an lm_chat_template "
            "cannot be exported to transformers: export --to nanovlm"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=BaseTokenizer.from_str(tokenizer.base.to_str()),
        eos_token=tokenizer.eos,
        pad_token=tokenizer.eos,
        padding_side="left",
        chat_template=config.lm_chat_template,
        extra_special_tokens=dict(config.vlm_extra_tokens),
    )


def start_pixels_above_zero(state: dict[str, Tensor], config: VLMConfig) -> None:
    """Change the patch embedding so that it takes pixels as `tiled_usage.cut` makes them.

    With e = 1 / 255: W ((x - e) - mean) / std + b = (W / std) x + (b - (e + mean) / std * sum(W)).
    """
    place = "model.vision_model.embeddings.patch_embedding"
    weight = state[f"{place}.weight"]
    offset = (1 / 255 + config.image_mean) / config.image_std * weight.sum((1, 2, 3))
    state[f"{place}.bias"] = state[f"{place}.bias"] - offset
    state[f"{place}.weight"] = weight / config.image_std


def transformers_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return a PreTrainedTokenizerFast with `<image>` as an additional entry."""
    from tokenizers import Tokenizer as BaseTokenizer
    from transformers import PreTrainedTokenizerFast

    base = BaseTokenizer.from_str(tokenizer.base.to_str())
    if base.token_to_id(IMAGE_TOKEN) is not None:
        raise ValueError(
            f"the tokenizer has an entry {IMAGE_TOKEN} already, which stands for an image in "
            "the exported prompt"
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token=tokenizer.eos,
        pad_token=tokenizer.eos,
        padding_side="left",  # generation continues at the right end of each row
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    # A post-processor that adds a first token, as Llama's does, would shift every prompt.
    text = "Question: is it? Answer:"
    if wrapped(text).input_ids != tokenizer.encode(text):
        raise ValueError(
            "the tokenizer adds tokens of its own to a text, which the model was not trained with"
        )
    return wrapped


def transformers_config(config: VLMConfig, rows: int, image_id: int, eos_id: int) -> Any:
    """Return the SmolVLMConfig of the same sizes, with `rows` entries in its vocabulary."""
    from transformers import LlamaConfig, SmolVLMConfig

    vision = {theirs: getattr(config, ours) for ours, theirs in VISION_FIELDS.items()}
    language = {theirs: getattr(config, ours) for ours, theirs in LANGUAGE_FIELDS.items()}
    rope = {"rope_type": "default", "rope_theta": config.lm_re_base}
    special = dict(bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=eos_id)
    text = LlamaConfig(**{**language, "vocab_size": rows, "rope_parameters": rope, **special})
    return SmolVLMConfig(
        vision_config={**vision, "hidden_act": "gelu_pytorch_tanh"},
        text_config=text.to_dict(),
        scale_factor=config.mp_pixel_shuffle_factor,
        image_token_id=image_id,
        tie_word_embeddings=config.lm_tie_weights,
    )


def transformers_state(model: VisionLanguageModel, rows: int) -> dict[str, Tensor]:
    """Return the weights under SmolVLM's names. Additional rows of the vocabulary are zero."""
    config = model.config
    ours = model.reference_state_dict()
    state = {"model.connector.modality_projection.proj.weight": ours["MP.proj.weight"]}
    for name, parts in vision_names(config.vit_n_blocks).items():
        tensor = ours[f"vision_encoder.{name}"]
        if name.endswith("position_embedding"):
            tensor = tensor[0]  # nanoVLM's is (1, P, C), SigLIP's (P, C)
        for part, rows_of_part in zip(parts, tensor.chunk(len(parts)), strict=True):
            state[f"model.vision_model.{part}"] = rows_of_part
    for name, theirs in language_names(config.lm_n_blocks).items():
        state[f"model.text_model.{theirs}"] = ours[f"decoder.{name}"]
    state["lm_head.weight"] = ours["decoder.head.weight"]
    for name in ("model.text_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, rows - config.lm_vocab_size))
    return state


@torch.no_grad()
def check_positions(embeddings: Any, config: VLMConfig) -> None:
    """Raise ValueError unless every patch gets its own position.

    SmolVLM finds a patch's position by rounding fractional coordinates, which goes wrong for some
    grids (19 x 19). Which ones is found by trying, as it depends on the version of transformers.
    """
    grid = config.grid
    pixels = torch.zeros(1, 3, config.vit_img_size, config.vit_img_size)
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    positions = embeddings(pixels, torch.ones(1, grid, grid, dtype=torch.bool)) - patches
    table = embeddings.position_embedding.weight
    if (positions[0] - table).abs().max() > 1e-4 * table.abs().max():
        raise ValueError(
            f"transformers' SmolVLM mixes up the positions of {grid} x {grid} patches (it rounds "
            "them wrongly): export --to nanovlm, or fine-tune with another --vit-img-size"
        )


def transformers_processor(config: VLMConfig, tokenizer: Any, eos: str) -> Any:
    """Return a processor that repeats `<image>` and resizes pictures as data/images.py does.

    DeepseekVLProcessor is used because it does only that: one tag becomes a fixed number of tokens.
    """
    from transformers import DeepseekVLProcessor, SmolVLMImageProcessor

    side = config.vit_img_size
    images = SmolVLMImageProcessor(
        size={"height": side, "width": side},
        max_image_size={"longest_edge": side},
        resample=2,  # bilinear
        do_image_splitting=False,  # SmolVLM cuts a picture into tiles; this model sees one square
        image_mean=[config.image_mean] * 3,
        image_std=[config.image_std] * 3,
    )
    return DeepseekVLProcessor(
        images, tokenizer, chat_template(config.prompt, eos), config.image_tokens
    )


def chat_template(prompt: str, eos: str, image: str = IMAGE_TOKEN) -> str:
    """Return a chat's Jinja template: all images, then the turns as data/text.py writes them.

    `image` is what stands for an image among the parts of a message.
    """
    # The prompt is split where the question goes. The template joins the pieces with the question
    # instead of using `format`, so braces in a question stay what they are.
    mark = "\0"  # cannot occur in a prompt from a command line
    pieces = json.dumps(prompt.format(question=mark).split(mark), ensure_ascii=False)
    return (
        "{%- for message in messages if message.content is not string -%}"
        "{%- for part in message.content if part.type == 'image' -%}"
        + image
        + "{%- endfor -%}{%- endfor -%}"
        "{%- for message in messages -%}"
        "{%- set text = message.content if message.content is string else "
        "message.content | selectattr('type', 'equalto', 'text') "
        "| map(attribute='text') | join('') -%}"
        "{%- if message.role == 'user' -%}{{ ('' if loop.first else '\\n') ~ ("
        + pieces
        + " | join(text)) }}"
        "{%- elif message.role == 'assistant' -%}{{ ' ' ~ text ~ "
        + json.dumps(eos, ensure_ascii=False)
        + " }}"
        "{%- else -%}{{ raise_exception('only user and assistant speak') }}{%- endif -%}"
        "{%- endfor -%}"
    )
