"""Model folders in nanoVLM's layout: writing, finding and reading them.

A model folder holds `config.json` (the fields of `VLMConfig`), `model.safetensors` under the
reference's names, and the files of a tokenizer if the model has one of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.config import VLMConfig, fields_of
from nanovlm_fast.data.images import printable
from nanovlm_fast.data.text import Tokenizer, is_hub_name
from nanovlm_fast.files import read_json
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.paths import at_home
from nanovlm_fast.ranges import check_types
from nanovlm_fast.runs import latest_run, standing
from nanovlm_fast.weights.adapter import write_adapter
from nanovlm_fast.weights.hub import MODEL_FILES, fetch
from nanovlm_fast.weights.tensors import stored_shapes

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Fields of nanoVLM v0.1's VLMConfig that ours does not have. These decide what the model computes.
# One value of each is supported; any other would change the outputs without an error.
SUPPORTED_VALUES: dict[str, object] = {
    "vit_dropout": 0.0,
    "vit_cls_flag": False,
    "lm_dropout": 0.0,
    "lm_attn_scaling": 1.0,
    "lm_use_tokens": False,
}
# These only say where v0.1's weights came from.
ORIGIN_FIELDS = (
    "vit_model_type",
    "lm_model_type",
    "lm_eos_token_id",
    "vlm_load_backbone_weights",
    "vlm_checkpoint_path",
)
V01_FIELDS = {*SUPPORTED_VALUES, *ORIGIN_FIELDS}

# Fields of ours that nanoVLM got after v0.1 (in v0.2 or main). A model as v0.1's has their defaults
# and is stored without them, as ever (`fields_to_store`).
FIELDS_AFTER_V01 = (
    "max_img_size",
    "resize_to_max_side_len",
    "vlm_extra_tokens",
    "lm_chat_template",
)
# Fields that came with them and follow from others. main's code needs them.
DERIVED_FIELDS = ("mp_image_token_length", "lm_base_vocab_size", "extra_token_amount")
# hf_repo_name came a week after v0.1, without effect.
KNOWN_FIELDS = {*V01_FIELDS, *DERIVED_FIELDS, "hf_repo_name"}


# ---- writing
def save_pretrained(
    folder: Path, model: VisionLanguageModel, tokenizer: Tokenizer | None = None
) -> None:
    """Write config.json, model.safetensors (nanoVLM's names, tied weights once) and the tokenizer.

    Without a tokenizer, one has to be named when the folder is loaded (`load_pretrained`).
    """
    write_pretrained(folder, model, model.state_dict(), tokenizer)


def write_pretrained(
    folder: Path,
    model: VisionLanguageModel,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Like `save_pretrained`, with `weights` under the names of the model's state dict.

    With sharded weights (FSDP) the full ones are gathered first and are not the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = model.by_reference_name(weights)
    if model.config.lm_tie_weights:
        state.pop("decoder.head.weight", None)  # safetensors refuses two names of one memory
    # Contiguous, because the parts of a fused matrix are views.
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(stored, folder / "model.safetensors")
    derived = derived_fields(model.config) if model.config.vlm_extra_tokens else {}
    values = {**model.extra_config, **derived, **fields_to_store(model.config)}
    if not is_hub_name(model.config.lm_tokenizer):
        # A folder's own tokenizer lies in it and is not named by a path, which would point nowhere
        # once the folder has moved. A tokenizer that lies elsewhere has its absolute path.
        own = tokenizer is not None or model.config.lm_tokenizer == "train"
        values["lm_tokenizer"] = "train" if own else str(Path(model.config.lm_tokenizer).resolve())
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    if model.adapter is not None:
        write_adapter(folder, model.adapter)
    if tokenizer is not None:
        tokenizer.save(folder)


def fields_to_store(config: VLMConfig) -> dict[str, Any]:
    """The entries of a config.json: all fields, those after v0.1 only where a model uses them."""
    values = dataclasses.asdict(config)
    if not config.max_img_size:
        del values["max_img_size"]
        del values["resize_to_max_side_len"]
    if not config.vlm_extra_tokens:
        del values["vlm_extra_tokens"]
    if not config.lm_chat_template:
        del values["lm_chat_template"]
    return values


def derived_fields(config: VLMConfig) -> dict[str, int]:
    """The fields of nanoVLM after v0.1 that follow from others, for a model with its tokens."""
    added = len(config.vlm_extra_tokens)
    values = (config.image_tokens, config.lm_vocab_size - added, added)
    return dict(zip(DERIVED_FIELDS, values, strict=True))


def tokenizer_of(folder: Path, config: VLMConfig, name: str = "") -> Tokenizer:
    """Load the tokenizer in `folder`, or else the one that its config.json names.

    With `name`, a hub name or folder, that one. The model's extra tokens are among its entries
    afterwards: nanoVLM's folders name a tokenizer without them.
    """
    tokenizer = Tokenizer.from_hub(name) if name else _own_tokenizer(folder, config.lm_tokenizer)
    tokenizer.reserve(list(config.vlm_extra_tokens.values()))
    if len(tokenizer) > config.lm_vocab_size:
        added = len(config.vlm_extra_tokens)
        those = f", with {added} extra tokens" if added else ""
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} ids{those}, the model "
            f"{config.lm_vocab_size}"
        )
    return tokenizer


def _own_tokenizer(folder: Path, name: str) -> Tokenizer:
    if (folder / "tokenizer.json").exists():
        return Tokenizer.load(folder)
    # Checked here and not left to the hub's client, which would take minutes to find out that there
    # is no repository called "train".
    if not is_hub_name(name) and not os.path.isdir(os.path.expanduser(name)):
        raise FileNotFoundError(
            f"{folder} was saved without its tokenizer (no tokenizer.json; lm_tokenizer in "
            f"config.json is {name!r}): --lm-tokenizer takes a hub name or a folder that has it"
        )
    return Tokenizer.from_hub(name)


def check_sizes(folder: Path, config: VLMConfig) -> None:
    """Raise ValueError unless the weights in `folder` have the sizes of `config`.

    Nothing is allocated. A few bytes of config.json can request terabytes, but the header of the
    weights cannot claim more than its file holds, so both are compared on the meta device.
    """
    file = folder / "model.safetensors"
    stored = stored_shapes(file)
    # Even a meta model of a billion blocks takes a billion Python objects.
    blocks = config.vit_n_blocks + config.lm_n_blocks
    if blocks > len(stored):
        raise ValueError(
            f"{folder / 'config.json'} asks for {blocks} blocks, {file} holds {len(stored)} tensors"
        )
    try:
        with torch.device("meta"):
            model = VisionLanguageModel(config)
    # Sizes that overflow raise each of these, depending on the operation.
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not a model configuration: {error}"
        ) from error
    try:
        model.load_reference_state_dict(stored)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_config(folder: Path) -> tuple[VLMConfig, dict[str, Any]]:
    """Read a folder's config.json: the configuration, and the entries that are not its fields.

    Raises ValueError if the file is damaged or describes a model that differs from the one here.
    Warns about fields that nanoVLM does not have either.
    """
    file = folder / "config.json"
    values = read_json(file)
    _check_layout(file, values)
    try:
        ours = fields_of(VLMConfig, values)
        check_types(VLMConfig, ours)
        config = VLMConfig(**ours).validate()
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{file} is not a model configuration: {error}") from error
    extra = {name: value for name, value in values.items() if name not in ours}
    stored = extra.get("mp_image_token_length", config.image_tokens)
    if stored != config.image_tokens:
        raise ValueError(
            f"{file}: mp_image_token_length = {printable(repr(stored))}, and its sizes give "
            f"{config.image_tokens} tokens per tile"
        )
    for name, supported in SUPPORTED_VALUES.items():
        if extra.get(name, supported) != supported:
            value = printable(repr(extra[name]))
            raise ValueError(f"{file}: {name} = {value}, only {supported} is supported")
    if unknown := sorted(extra.keys() - KNOWN_FIELDS):
        names = printable(", ".join(unknown))
        warnings.warn(f"{file}: fields not used here: {names}", stacklevel=3)
    return config, extra


def _check_layout(file: Path, values: dict[str, Any]) -> None:
    """Raise ValueError for configurations of other models that have files of the same names."""
    if "model_type" in values and "vit_hidden_dim" not in values:
        kind = printable(repr(values["model_type"]))
        raise ValueError(
            f"{file}: a configuration of transformers (model_type {kind}): only nanoVLM's layout "
            "can be read; use the checkpoint that this folder was exported from"
        )


# ---- finding
def resolve(checkpoint: Path | str | None) -> Path:
    """Find the folder that holds model.safetensors.

    Args:
        checkpoint: that folder, a run (its newest checkpoint is taken), or a hub name; None is the
            latest run.

    Raises:
        FileNotFoundError: naming what was looked for.
        OSError: if the hub does not provide it.
        ValueError: for weights that are a pickle, since reading one can run any code.
    """
    folder = at_home(str(checkpoint)) if checkpoint is not None else latest_run()
    folder = _where_it_stands(folder)
    # A hub name looks like a relative path. If its parent is a folder here, it is a mistyped path
    # and the hub is not asked.
    if isinstance(checkpoint, str) and not folder.exists() and not folder.parent.is_dir():
        folder = fetch(checkpoint, *MODEL_FILES)
    if (folder / "model.safetensors").exists():
        return folder
    if newest := newest_checkpoint(standing(folder)):
        return newest
    for file in sorted([folder, *folder.glob("*")]):
        if file.suffix in PICKLE_SUFFIXES and file.is_file():
            raise ValueError(
                f"{file}: pickles are not read, only safetensors: a checkpoint has a "
                "model.safetensors"
            )
    raise FileNotFoundError(
        f"{folder}: neither a checkpoint (model.safetensors) nor a run that holds one"
    )


def _where_it_stands(folder: Path) -> Path:
    """RUN/last, or RUN/checkpoints/step-NNNNNN, while --overwrite keeps the run aside.

    Any other folder is returned as it is, and so is one that is there.
    """
    if folder.exists():
        return folder
    for run in (folder.parent, folder.parent.parent):
        aside = standing(run) / folder.relative_to(run)
        if aside.exists():
            return aside
    return folder


def newest_checkpoint(run: Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None."""
    return max(checkpoints_of(run), key=step_of, default=None)


def checkpoints_of(run: Path) -> list[Path]:
    """Return all complete checkpoints, in no particular order.

    A checkpoint is written under another name and then renamed, so a name of this form is complete.
    """
    folders = (run / "checkpoints").glob("step-*")
    return [folder for folder in folders if folder.name[5:].isdecimal()]


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder, step-NNNNNN."""
    return int(folder.name[5:])
