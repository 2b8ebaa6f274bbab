"""Checkpoints for others: a folder that transformers loads without remote code, or one that nanoVLM v0.1 loads.

    python -m nanovlm_fast.export --checkpoint RUN --to transformers --out FOLDER

transformers' SmolVLM architecture (Marafioti et al., 2025) is the same function: SigLIP tower, pixel shuffle, linear
projector, Llama decoder. Its own processor puts tokens around an image that this model never saw; the one exported
here repeats `<image>` and nothing else. Two things are transformers' own: an image of zeros is taken for padding (where
`image_mean` is 0, a plain black picture beside others in one batch is not seen), and with torchvision installed it is
torchvision that resizes, one level of 255 off in about a thousandth of the pixels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.backbones import LANGUAGE_FIELDS, VISION_FIELDS, language_names, vision_names
from nanovlm_fast.checkpoint import V01_FIELDS, load_pretrained, resolve
from nanovlm_fast.command import Parser, reports_errors
from nanovlm_fast.config import VLMConfig, read_json
from nanovlm_fast.data.text import Tokenizer, is_hub_name
from nanovlm_fast.hub import model_card, push_to_hub
from nanovlm_fast.model import VisionLanguageModel

IMAGE = "<image>"
NOT_NANOVLMS = ("image_mean", "image_std", "init", "prompt")  # fields of our VLMConfig that v0.1's does not have


# ---- nanoVLM


def to_nanovlm(
    folder: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer | None = None,
    name: str = "",
) -> None:
    """Write config.json, model.safetensors and the tokenizer so that nanoVLM v0.1's `from_pretrained` takes them.

    v0.1 accepts only the fields of its own VLMConfig and feeds plain [0, 1] pixels: the normalisation is folded into
    the patch embedding. Fields of v0.1 in the config.json that the model came with are kept. v0.1
    loads the tokenizer by its name in config.json: the model's own gets `name` (default: `folder`).
    Raises ValueError if such a one is not given.
    """
    config = model.config
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_NANOVLMS}
    if not is_hub_name(config.lm_tokenizer):
        if tokenizer is None:
            raise ValueError(
                f"{folder}: nanoVLM loads a tokenizer by its name, and the model's is its own "
                f"(lm_tokenizer is {config.lm_tokenizer!r}): give it (tokenizer=) to be written too"
            )
        values["lm_tokenizer"] = name or str(folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    if config.prompt != VLMConfig.prompt:
        warnings.warn(f"nanoVLM's prompt is {VLMConfig.prompt!r}, this model's {config.prompt!r}", stacklevel=2)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.reference_state_dict().items()}
    conv = "vision_encoder.patch_embedding.conv."
    weight = state[f"{conv}weight"]
    state[f"{conv}bias"] = state[f"{conv}bias"] - config.image_mean / config.image_std * weight.sum((1, 2, 3))
    state[f"{conv}weight"] = weight / config.image_std
    if config.lm_tie_weights:
        del state["decoder.head.weight"]
    save_file(state, folder / "model.safetensors")
    extra = {name: value for name, value in model.extra_config.items() if name in V01_FIELDS}
    (folder / "config.json").write_text(json.dumps({**extra, **values}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


# ---- transformers


def to_transformers(folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
    """Write model, tokenizer, image processor and chat template for AutoModelForImageTextToText and AutoProcessor.

    Raises ValueError for what transformers' classes cannot express: a tokenizer that adds tokens of its own or has an
    entry `<image>`, and numbers of patches for which SmolVLM rounds positions wrongly.
    """
    from transformers import GenerationConfig, SmolVLMForConditionalGeneration

    wrapped = transformers_tokenizer(tokenizer)
    image_id = wrapped.convert_tokens_to_ids(IMAGE)
    rows = max(model.config.lm_vocab_size, image_id + 1)
    theirs = SmolVLMForConditionalGeneration(transformers_config(model.config, rows, image_id, tokenizer.eos_id))
    theirs.load_state_dict(transformers_state(model, rows))
    check_positions(theirs.model.vision_model.embeddings, model.config)
    eos = tokenizer.eos_id
    theirs.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos, suppress_tokens=[image_id])
    theirs.save_pretrained(folder)
    transformers_processor(model.config, wrapped, tokenizer.eos).save_pretrained(folder)


def transformers_tokenizer(tokenizer: Tokenizer) -> Any:
    """A PreTrainedTokenizerFast with `<image>` as one more entry."""
    from tokenizers import Tokenizer as BaseTokenizer
    from transformers import PreTrainedTokenizerFast

    base = BaseTokenizer.from_str(tokenizer.base.to_str())
    if base.token_to_id(IMAGE) is not None:
        raise ValueError(
            f"the tokenizer has an entry {IMAGE} already, which stands for an image in the exported prompt"
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token=tokenizer.eos,
        pad_token=tokenizer.eos,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE},
    )
    text = "Question: is it? Answer:"
    if wrapped(text).input_ids != tokenizer.encode(text):
        raise ValueError("the tokenizer adds tokens of its own to a text, which the model was not trained with")
    return wrapped


def transformers_config(config: VLMConfig, rows: int, image_id: int, eos_id: int) -> Any:
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
    """The weights under SmolVLM's names; rows of the vocabulary beyond the model's are zero."""
    config, ours = model.config, model.reference_state_dict()
    state = {"model.connector.modality_projection.proj.weight": ours["MP.proj.weight"]}
    for name, theirs in vision_names(config.vit_n_blocks).items():
        tensor = ours[f"vision_encoder.{name}"]
        tensor = tensor[0] if name.endswith("position_embedding") else tensor
        parts = zip(theirs, tensor.chunk(len(theirs)), strict=True)
        state.update({f"model.vision_model.{key}": part for key, part in parts})
    for name, theirs in language_names(config.lm_n_blocks).items():
        state[f"model.text_model.{theirs}"] = ours[f"decoder.{name}"]
    state["lm_head.weight"] = ours["decoder.head.weight"]
    for name in ("model.text_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, rows - config.lm_vocab_size))
    return state


@torch.no_grad()
def check_positions(embeddings: Any, config: VLMConfig) -> None:
    """Raise ValueError unless every patch gets its own position: SmolVLM looks them up by fractional coordinates."""
    grid, pixels = config.grid, torch.zeros(1, 3, config.vit_img_size, config.vit_img_size)
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    positions = embeddings(pixels, torch.ones(1, grid, grid, dtype=torch.bool)) - patches
    table = embeddings.position_embedding.weight
    if (positions[0] - table).abs().max() > 1e-4 * table.abs().max():
        raise ValueError(
            f"transformers' SmolVLM mixes up the positions of {grid} x {grid} patches (it rounds them wrongly): export "
            "--to nanovlm, or fine-tune with another --vit-img-size"
        )


def transformers_processor(config: VLMConfig, tokenizer: Any, eos: str) -> Any:
    """A processor: `<image>` becomes the image's tokens, pictures are squashed to the square as in data/images.py."""
    from transformers import DeepseekVLProcessor, SmolVLMImageProcessor  # the former is the plainest there is

    side = config.vit_img_size
    images = SmolVLMImageProcessor(
        size={"height": side, "width": side},
        max_image_size={"longest_edge": side},
        resample=2,  # bilinear
        do_image_splitting=False,
        image_mean=[config.image_mean] * 3,
        image_std=[config.image_std] * 3,
    )
    return DeepseekVLProcessor(images, tokenizer, chat_template(config.prompt, eos), config.image_tokens)


def chat_template(prompt: str, eos: str) -> str:
    """Jinja: all images first, then the turns as data/text.py writes them."""
    mark = "\0"
    pieces = json.dumps(prompt.format(question=mark).split(mark), ensure_ascii=False)
    return (
        "{%- for message in messages if message.content is not string -%}"
        "{%- for part in message.content if part.type == 'image' -%}" + IMAGE + "{%- endfor -%}{%- endfor -%}"
        "{%- for message in messages -%}"
        "{%- set text = message.content if message.content is string else "
        "message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
        "{%- if message.role == 'user' -%}{{ ('' if loop.first else '\\n') ~ (" + pieces + " | join(text)) }}"
        "{%- elif message.role == 'assistant' -%}{{ ' ' ~ text ~ " + json.dumps(eos, ensure_ascii=False) + " }}"
        "{%- else -%}{{ raise_exception('only user and assistant speak') }}{%- endif -%}"
        "{%- endfor -%}"
    )


# ---- the command

TARGETS = ("transformers", "nanovlm")


def export(
    checkpoint: Path | str | None,
    target: str,
    out: Path,
    name: str = "",
    lm_tokenizer: str = "",
) -> Path:
    """Write the checkpoint in the layout of `target` with a model card; returns `out`, which appears whole or not.

    `name` is what it will be loaded by (default: `out`): nanoVLM loads a tokenizer of the model's own by it.
    `lm_tokenizer` is taken instead of the checkpoint's tokenizer.
    Raises ValueError if `out` holds files or the target cannot express the model, and what `load_pretrained` raises.
    """
    place = out.resolve()
    if place == Path.cwd():
        raise ValueError(f"--out '{out}' is the folder that you are in: name a new one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: --out names another folder")
    folder = resolve(checkpoint)
    model, tokenizer = load_pretrained(folder, lm_tokenizer=lm_tokenizer)
    model.eval()
    loaded_by = name or str(place)
    if not is_hub_name(model.config.lm_tokenizer):
        model.config = dataclasses.replace(model.config, lm_tokenizer=loaded_by)
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if target == "transformers":
            to_transformers(temporary, model, tokenizer)
        else:
            to_nanovlm(temporary, model, tokenizer, loaded_by)
        card = model_card(folder, target, model, name or place.name)
        (temporary / "README.md").write_text(card)
        os.replace(temporary, place)
    except SafetensorError as error:  # a full disk among others
        raise OSError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def names_a_place(folder: Path) -> bool:
    """Whether a folder in nanoVLM's layout names a place on this machine for its tokenizer."""
    return Path(read_json(folder / "config.json")["lm_tokenizer"]).is_absolute()


def make_parser() -> Parser:
    parser = Parser(prog="python -m nanovlm_fast.export", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="run, RUN/best, model folder or hub name; default: the latest run")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--push", default="", metavar="OWNER/NAME", help="upload it to the Hugging Face hub too")
    parser.add_argument("--private", action="store_true", help="the repository that --push makes is private")
    parser.add_argument("--lm-tokenizer", default="", help="hub name or folder; default: its own")
    return parser


@reports_errors()
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    out = export(args.checkpoint, args.to, args.out, args.push, args.lm_tokenizer)
    print(f"written: {out}")
    if args.to == "nanovlm" and names_a_place(out):
        print(
            "nanoVLM looks for the tokenizer here, by lm_tokenizer in config.json: once it has "
            "moved, write the new place there; --push writes the hub's name"
        )
    if args.push:
        print(f"uploaded: {push_to_hub(args.out, args.push, args.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
