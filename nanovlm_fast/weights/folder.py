"""Model folders in nanoVLM's layout: written, found and read."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.config import VLMConfig, check_types, fields_of
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.text import Tokenizer, is_hub_name
from nanovlm_fast.files import read_json
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.paths import at_home
from nanovlm_fast.runs import latest_run, standing
from nanovlm_fast.weights.hub import WEIGHTS, fetch
from nanovlm_fast.weights.tensors import load_tensors, stored_shapes

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Fields of nanoVLM v0.1's VLMConfig that ours has not. Those that decide what a model computes have
# one value that is supported here; the others say where it came from
SUPPORTED = {
    "vit_dropout": 0.0,
    "vit_cls_flag": False,
    "lm_dropout": 0.0,
    "lm_attn_scaling": 1.0,
    "lm_use_tokens": False,
}
ORIGIN = (
    "vit_model_type",
    "lm_model_type",
    "lm_eos_token_id",
    "vlm_load_backbone_weights",
    "vlm_checkpoint_path",
)
V01_FIELDS = {*SUPPORTED, *ORIGIN}
# Fields that came after v0.1, with image tokens among the text: same keys, another function
LATER = tuple(
    "mp_image_token_length vlm_extra_tokens lm_chat_template lm_base_vocab_size "
    "extra_token_amount max_img_size resize_to_max_side_len".split()
)
KNOWN = {*V01_FIELDS, "hf_repo_name"}  # the latter came a week after v0.1 and changes nothing

Model = TypeVar("Model", bound=VisionLanguageModel)


def save_pretrained(
    folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer | None = None
) -> None:
    """Write config.json, model.safetensors (nanoVLM's keys; tied weights once), the tokenizer.

    Without a tokenizer the folder loads with one that is named then (`load_pretrained`).
    """
    write_pretrained(folder, model, model.state_dict(), tokenizer)


def write_pretrained(
    folder: Path,
    model: VisionLanguageModel,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """`save_pretrained` of other `weights` than the model's own, under the names of its state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.by_reference_name(weights)
    if model.config.lm_tie_weights:
        state.pop("decoder.head.weight", None)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
        folder / "model.safetensors",
    )
    values = {**model.extra_config, **dataclasses.asdict(model.config)}
    if not is_hub_name(model.config.lm_tokenizer):  # a path means nothing once a folder has moved
        own = tokenizer is not None or model.config.lm_tokenizer == "train"
        values["lm_tokenizer"] = "train" if own else str(Path(model.config.lm_tokenizer).resolve())
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def load_pretrained(
    checkpoint: Path | str | None = None, device: str | torch.device = "cpu", lm_tokenizer: str = ""
) -> tuple[VisionLanguageModel, Tokenizer]:
    """Model and tokenizer of a checkpoint folder, a run folder (its last checkpoint), or the latest run.

    The tokenizer is `lm_tokenizer` (hub name or folder), or else the folder's own, or else the one
    that its config.json names.
    Raises FileNotFoundError if there is nothing there and ValueError, naming the file or the weights, if it is damaged
    or does not fit its configuration.
    """
    folder = resolve(checkpoint)
    model = load_model(folder)
    if lm_tokenizer:
        tokenizer = Tokenizer.from_hub(lm_tokenizer)
        model.config = dataclasses.replace(model.config, lm_tokenizer=lm_tokenizer)
    else:
        tokenizer = tokenizer_of(folder, model.config.lm_tokenizer)
    if len(tokenizer) > model.config.lm_vocab_size:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} ids, the model {model.config.lm_vocab_size}"
        )
    return model.to(device), tokenizer


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    """The tokenizer in `folder`, or the one that its config.json calls `name`."""
    if (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    if not is_hub_name(name) and not os.path.isdir(os.path.expanduser(name)):
        raise FileNotFoundError(
            f"{folder} was saved without its tokenizer (no tokenizer.json; lm_tokenizer in "
            f"config.json is {name!r}): --lm-tokenizer takes a hub name or a folder that has it"
        )
    return Tokenizer.from_hub(name)


def load_model(folder: Path, model_class: type[Model] = VisionLanguageModel) -> Model:
    """The model of a folder that `resolve` gave, on the CPU. Raises what `load_pretrained` raises."""
    config, extra = read_config(folder)
    check_sizes(folder, config)
    model = model_class(config)
    model.extra_config = extra
    model.load_reference_state_dict(load_tensors(folder / "model.safetensors"))
    return model


def check_sizes(folder: Path, config: VLMConfig) -> None:
    """Raise ValueError unless the weights in `folder` are those of `config`, before memory is taken for the model.

    A few bytes of config.json can ask for terabytes; the header of the weights cannot promise more than the file has.
    """
    file = folder / "model.safetensors"
    stored, blocks = stored_shapes(file), config.vit_n_blocks + config.lm_n_blocks
    if blocks > len(stored):
        raise ValueError(
            f"{folder / 'config.json'} asks for {blocks} blocks, {file} holds {len(stored)} tensors"
        )
    try:
        with torch.device("meta"):
            model = VisionLanguageModel(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not a model configuration: {error}"
        ) from error
    try:
        model.load_reference_state_dict(stored)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_config(folder: Path) -> tuple[VLMConfig, dict[str, Any]]:
    """Model configuration of a checkpoint folder, and the entries of its config.json that are no fields of it.

    Raises ValueError if the file is damaged, or asks for a model that differs from the one here.
    Warns of entries that nanoVLM v0.1 has not either.
    """
    file = folder / "config.json"
    values = read_json(file)
    if later := [name for name in LATER if name in values]:
        raise ValueError(
            f"{file}: a checkpoint of a nanoVLM newer than v0.1 (it has {', '.join(later)}), with "
            "another text format and other image tokens: only v0.1's are supported"
        )
    if "model_type" in values and "vit_hidden_dim" not in values:
        kind = printable(repr(values["model_type"]))
        raise ValueError(
            f"{file}: a configuration of transformers (model_type {kind}): only nanoVLM's layout "
            "is read, which the checkpoint that it was exported from has"
        )
    try:
        check_types(VLMConfig, fields_of(VLMConfig, values))
        extra = {
            name: value
            for name, value in values.items()
            if name not in fields_of(VLMConfig, values)
        }
        config = VLMConfig(**fields_of(VLMConfig, values)).validate()
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{file} is not a model configuration: {error}") from error
    for name, same in SUPPORTED.items():
        if extra.get(name, same) != same:
            value = printable(repr(extra[name]))
            raise ValueError(f"{file}: {name} = {value}, only {same} is supported")
    if unknown := sorted(extra.keys() - KNOWN):
        names = printable(", ".join(unknown))
        warnings.warn(f"{file}: fields not used here: {names}", stacklevel=3)
    return config, extra


def resolve(checkpoint: Path | str | None) -> Path:
    """The folder that holds model.safetensors: `checkpoint` itself, the newest checkpoint of a run, or a hub name's.

    None is the latest run. Raises FileNotFoundError naming what was looked for, OSError if the hub did not give it,
    and ValueError for weights that are a pickle: reading one can run any code.
    """
    folder = at_home(str(checkpoint)) if checkpoint is not None else latest_run()
    if isinstance(checkpoint, str) and not folder.exists() and not folder.parent.is_dir():
        folder = fetch(checkpoint, *WEIGHTS)
    if (folder / "model.safetensors").exists():
        return folder
    if newest := newest_checkpoint(standing(folder)):
        return newest
    for file in sorted([folder, *folder.glob("*")]):
        if file.suffix in PICKLES and file.is_file():
            raise ValueError(
                f"{file}: pickles are not read, only safetensors: a checkpoint has a model.safetensors"
            )
    raise FileNotFoundError(
        f"{folder}: neither a checkpoint (model.safetensors) nor a run that holds one"
    )


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return max(checkpoints_of(run), key=step_of, default=None)


def checkpoints_of(run: Path) -> list[Path]:
    """All complete checkpoints, in no order."""
    return [
        folder for folder in (run / "checkpoints").glob("step-*") if folder.name[5:].isdecimal()
    ]


def step_of(folder: Path) -> int:
    return int(folder.name[5:])
