"""Pretrained weights to start a run from: SigLIP towers, Llama models, whole checkpoints.

It happens in two steps. Before the model is built, its sizes are read from the source's config.json
(`pretrained_fields`). Afterwards the weights are copied from the source's safetensors
(`load_pretrained_weights`). Two sizes may differ from the source: the image size, for which the
position embeddings are resized, and the vocabulary, which may have more rows.

A checkpoint that holds an adapter is read with its base, and merged (`checkpoint_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.files import read_json
from nanovlm_fast.model.init import NANOVLM_STD
from nanovlm_fast.model.lora import Adapter, check_complete, merged
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.ranges import check_types
from nanovlm_fast.weights.adapter import (
    ADAPTER,
    check_base,
    described,
    hashes_of,
    is_adapter,
    read_adapter,
)
from nanovlm_fast.weights.folder import check_sizes, read_config, resolve
from nanovlm_fast.weights.hub import MODEL_FILES, fetch, reason
from nanovlm_fast.weights.names import LANGUAGE_FIELDS, VISION_FIELDS, language_names, vision_names
from nanovlm_fast.weights.tensors import load_tensors, stored_shapes

# Fields that a run may set otherwise than its source. The weights are adapted to the first two;
# the others do not change any weight's shape.
ADJUSTABLE_FIELDS = frozenset(
    {
        "vit_img_size",
        "lm_vocab_size",
        "lm_max_position_embeddings",
        "lm_max_length",
        "lm_tokenizer",
        "image_mean",
        "image_std",
        "init",
        "prompt",
        "max_img_size",
        "resize_to_max_side_len",
        "lm_chat_template",
    }
)

# By how many times a run with adapters may exceed these sizes of its base. An adapter's config.json
# comes from elsewhere, and must not request any amount of memory.
GROWTH = {"lm_vocab_size": 2, "vit_img_size": 8}


# ---- sizes
def pretrained_fields(
    train: TrainConfig, defaults: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what the sources that `train` names say about the model.

    Returns:
        The options' new defaults, and the fields that a run with these weights must have. They
        differ where a source is the preset's own (as in `defaults`): such a preset is a published
        recipe, so its normalisation and tokenizer stay.

    Raises:
        ValueError: naming the source, for an architecture that the model here does not have.
        OSError: if the source is not available.
    """
    brought: dict[str, Any] = {}
    must: dict[str, Any] = {}
    for source, read in (
        ("start_from", checkpoint_fields),
        ("vision", vision_fields),
        ("language", language_fields),
    ):
        if name := getattr(train, source):
            fields = read(name)
            check_types(VLMConfig, fields)
            must |= fields
            own = defaults if name == defaults.get(source) else {}
            brought |= {key: own.get(key, value) for key, value in fields.items()}
            if source == "language" and not own:  # the preset's tokens follow those of the model
                brought["lm_vocab_size"] += len(defaults.get("vlm_extra_tokens", ()))
    return brought, must


def check_fields(model: VLMConfig, must: dict[str, Any]) -> None:
    """Raise ValueError naming the first option that the pretrained weights rule out.

    `must` is the second result of `pretrained_fields`.
    """
    for name, value in must.items():
        flag = f"--{name.replace('_', '-')}"
        chosen = getattr(model, name)
        if name == "vlm_extra_tokens" and not value:
            continue  # of a model without any: they get new rows
        if name not in ADJUSTABLE_FIELDS and chosen != value:
            raise ValueError(f"{flag} {chosen}: the pretrained weights have {value}")
        if name == "lm_vocab_size" and chosen < value:
            raise ValueError(
                f"{flag} {chosen}: the pretrained weights have {value} rows, and none may be "
                "dropped"
            )
    if "lm_tokenizer" in must and model.lm_tokenizer == "train":
        raise ValueError(
            "--lm-tokenizer train: pretrained embeddings mean nothing with a new tokenizer; "
            "name the one that they were trained with"
        )


def check_tokenizer(chosen: str, trained: str) -> None:
    """Raise ValueError if an id stands for different text in the tokenizers `chosen` and `trained`.

    The embeddings were trained with `trained`. Either tokenizer may have more ids than the other,
    and added tokens of its own: reserved ones are often renamed, and new ones get new rows. Nothing
    is checked if `trained` is not available, as for weights without a tokenizer, or offline.
    """
    if trained == "train":  # made from the data of a run, and stored nowhere by itself
        return
    try:
        theirs = meanings(Tokenizer.from_hub(trained))
    except (OSError, ValueError):
        return
    ours = meanings(Tokenizer.from_hub(chosen))
    common = sorted(theirs.keys() & ours.keys())
    differing = [i for i in common if theirs[i] != ours[i]]
    if differing:
        first = differing[0]
        raise ValueError(
            f"--lm-tokenizer {chosen}: {len(differing)} of {len(common)} ids mean something else "
            f"than the pretrained embeddings have learned, the first, {first}, {ours[first]!r} "
            f"and not {theirs[first]!r}; their tokenizer is {trained}"
        )


def meanings(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens of a vocabulary by id, without added tokens."""
    added = tokenizer.base.get_added_tokens_decoder()
    return {i: token for token, i in tokenizer.base.get_vocab().items() if i not in added}


def checkpoint_fields(name: str) -> dict[str, Any]:
    """Return the model fields of a checkpoint to start from."""
    folder = resolve(name)
    config, _ = read_config(folder)
    if not is_adapter(folder):  # whose sizes are those of its base, and checked with it
        check_sizes(folder, config)  # before the command line is accepted: nothing is written then
    fields = dict(vars(config))
    if (folder / "tokenizer.json").exists():
        fields["lm_tokenizer"] = str(folder.resolve())
    return fields


def vision_fields(name: str) -> dict[str, Any]:
    """Return the model fields that a SigLIP tower determines. Raises ValueError for others."""
    config = hub_config(name)
    check_plain_weights(f"--vision {name}", config)
    config = getattr(config, "vision_config", config)  # a whole SigLIP has its text tower beside it
    wanted = {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "attention_dropout": 0.0,
    }
    check_architecture(f"--vision {name}", "a SigLIP tower of one resolution", config, wanted)
    fields = {ours: getattr(config, theirs) for ours, theirs in VISION_FIELDS.items()}
    return {**fields, **normalisation(name)}


def normalisation(name: str) -> dict[str, float]:
    """Return image_mean and image_std of a tower, from its preprocessor_config.json if it has one.

    Raises ValueError for a normalisation other than one mean and one deviation for all colours.
    """
    file = fetch(name, "config.json", "preprocessor_config.json") / "preprocessor_config.json"
    values = read_json(file) if file.exists() else {}
    if values.get("do_normalize") is False:
        mean: Any = 0.0
        std: Any = 1.0
    else:
        mean = _default(values.get("image_mean"), 0.5)  # as in all of Google's SigLIP
        std = _default(values.get("image_std"), 0.5)
    scale = values.get("rescale_factor", 1 / 255)
    means = mean if isinstance(mean, list) else [mean]
    stds = std if isinstance(std, list) else [std]
    numbers = [*means, *stds, scale]
    if not all(type(number) in (int, float) for number in numbers):
        found = f"image_mean {mean!r}, image_std {std!r}, rescale_factor {scale!r}"
        raise ValueError(f"--vision {name}: {file.name} is damaged: {found}")
    alike = len(set(means)) == 1 and len(set(stds)) == 1
    # 1/255 is written with a different number of digits in different files.
    if not alike or values.get("do_rescale") is False or abs(scale * 255 - 1) > 1e-3:
        raise ValueError(
            f"--vision {name}: {file.name} has a normalisation that is not supported: it must "
            "take pixels in [0, 1], with one image_mean and image_std for all colours"
        )
    return {"image_mean": float(means[0]), "image_std": float(stds[0])}


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def language_fields(name: str) -> dict[str, Any]:
    """Return the model fields that a Llama-architecture model determines.

    Raises ValueError for other language models.
    """
    config = hub_config(name)
    check_plain_weights(f"--language {name}", config)
    wanted = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }
    check_architecture(f"--language {name}", "a Llama-architecture model", config, wanted)
    rope = config.rope_parameters
    plain = {"rope_type": "default", "head_dim": config.hidden_size // config.num_attention_heads}
    found = {"rope_type": rope.get("rope_type", "default"), "head_dim": config.head_dim}
    if found != plain:
        raise ValueError(f"--language {name}: {found}, the model here has {plain}")
    fields = {ours: getattr(config, theirs) for ours, theirs in LANGUAGE_FIELDS.items()}
    # The whole path, so that a run can be resumed from another folder.
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    return {**fields, "lm_re_base": float(rope["rope_theta"]), "lm_tokenizer": place}


def hub_config(name: str) -> Any:
    """Return the configuration of a hub name or folder, as a transformers object.

    Read through transformers and not as plain JSON, because a field that the file leaves out has
    its class's default.
    """
    folder = fetch(name, "config.json")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{name}: there is no config.json in it")
    from transformers import AutoConfig

    try:
        read_json(folder / "config.json")
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # transformers checks few values, so an unexpected one can lead to any exception.
    except Exception as error:
        raise ValueError(
            f"{name}: config.json is not one that transformers reads: {reason(error)}"
        ) from error


def check_plain_weights(option: str, config: Any) -> None:
    """Raise ValueError for quantised weights, which mean nothing without their scales."""
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{option} is quantised (quantization_config): only weights that are not can be read"
        )


def check_architecture(option: str, what: str, config: Any, wanted: dict[str, Any]) -> None:
    """Raise ValueError naming the first entry of `wanted` that `config` does not have."""
    for key, value in wanted.items():
        found = getattr(config, key, None)
        if found != value:
            raise ValueError(f"{option} is not {what}: its {key} is {found!r}, not {value!r}")


# ---- weights
def load_pretrained_weights(model: VisionLanguageModel, train: TrainConfig) -> None:
    """Copy the weights that `train` names into `model`, in place.

    Parts of the model that no source has keep their initial weights. Raises ValueError naming
    weights that are missing or have another shape, and FileNotFoundError for sources without
    safetensors.
    """
    state: dict[str, Tensor] = {}
    if train.start_from:
        folder = resolve(train.start_from)
        _, model.extra_config = read_config(folder)
        state |= checkpoint_weights(folder)
    if train.vision:
        state |= vision_weights(train.vision, model.config)
    if train.language:
        state |= language_weights(train.language, model.config)
    if not state:
        return
    ours = model.reference_state_dict()
    key = "vision_encoder.patch_embedding.position_embedding"
    if key in state:
        state[key] = resize_positions(state[key], model.config.grid)
    for key in ("decoder.token_embedding.weight", "decoder.head.weight"):
        if key in state:
            state[key] = extend_rows(state[key], model.config.lm_vocab_size)
    if model.config.lm_tie_weights:
        # One tensor, which the model has under both names and a source under either. The model's
        # own copy must go, or it would be loaded over the source's.
        head = state.pop("decoder.head.weight", None)
        if head is not None:
            state.setdefault("decoder.token_embedding.weight", head)
        del ours["decoder.head.weight"]
    model.load_reference_state_dict({**ours, **state})


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights in a model folder, with an adapter merged into its base.

    Raises ValueError or OSError, naming the folder, for a base that is missing or has changed.
    """
    file = folder / "model.safetensors"
    stored = load_tensors(file)
    if not is_adapter(folder):
        return stored
    config, _ = read_config(folder)
    adapter = read_adapter(folder)
    model = base_model(folder, config, adapter)
    check_base(folder, adapter, hashes_of(model), stored)
    try:
        check_complete(dict(model.named_parameters()), stored, adapter.rank)
        weights = merged(model.state_dict(), stored, adapter.scaling)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return model.by_reference_name(weights)


def base_model(folder: Path, config: VLMConfig, adapter: Adapter) -> VisionLanguageModel:
    """Return the model that the adapter in a folder belongs to. Raises ValueError or OSError."""
    train = TrainConfig(**adapter.base)
    try:
        check_chain(folder)
        check_adapted_sizes(folder, config, pretrained_fields(train, {})[1])
        with torch.random.fork_rng(devices=[]):
            # What no source has was drawn by the run's seed, as it is here.
            torch.manual_seed(train.seed)
            model = VisionLanguageModel(config)
            load_pretrained_weights(model, train)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{folder} is an adapter of {described(adapter.base)}, which cannot be read: {error} "
            f"({ADAPTER} in it names where the base lies)"
        ) from error
    return model


def check_chain(folder: Path) -> None:
    """Raise ValueError if an adapter's base is, by way of others, the adapter itself."""
    seen = {folder.resolve()}
    name = read_adapter(folder).base["start_from"]
    while name and is_adapter(base := resolve(name).resolve()):
        if base in seen:
            raise ValueError(f"{folder} is an adapter of itself, by {ADAPTER} in {base}")
        seen.add(base)
        name = read_adapter(base).base["start_from"]


def check_adapted_sizes(folder: Path, config: VLMConfig, must: dict[str, Any]) -> None:
    """Raise ValueError for a config.json that the base `must` and the weights do not fit.

    Nothing is allocated, as in `folder.check_sizes`.
    """
    # Its tokenizer is in the folder.
    check_fields(config, {name: must[name] for name in must if name != "lm_tokenizer"})
    stored = stored_shapes(folder / "model.safetensors")
    if "vit_n_blocks" not in must and config.vit_n_blocks > len(stored):
        raise ValueError(f"vit_n_blocks = {config.vit_n_blocks}, of {len(stored)} tensors")
    for name, times in GROWTH.items():
        if getattr(config, name) > times * must.get(name, getattr(config, name)):
            raise ValueError(f"{name} = {getattr(config, name)}, and the base's is {must[name]}")
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    merged(model.state_dict(), stored, 1.0)


def vision_weights(name: str, config: VLMConfig) -> dict[str, Tensor]:
    """Read a SigLIP tower under the reference's names, without text tower and pooling head."""
    tensors = read_tensors(name, lambda key: not key.startswith(("text_model.", "logit_")))
    tensors = {key.removeprefix("vision_model."): tensor for key, tensor in tensors.items()}
    state = {}
    for ours, theirs in vision_names(config.vit_n_blocks).items():
        state[f"vision_encoder.{ours}"] = torch.cat([_take(tensors, key, name) for key in theirs])
    key = "vision_encoder.patch_embedding.position_embedding"
    state[key] = state[key][None]  # SigLIP's is (P, C), nanoVLM's (1, P, C)
    return state


def language_weights(name: str, config: VLMConfig) -> dict[str, Tensor]:
    """Read a Llama-architecture model under the reference's names."""
    tensors = read_tensors(name, lambda key: True)
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    names = language_names(config.lm_n_blocks)
    if not config.lm_tie_weights:
        names["head.weight"] = "lm_head.weight"
    return {f"decoder.{ours}": _take(tensors, theirs, name) for ours, theirs in names.items()}


def _take(tensors: dict[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{name}: its safetensors have no {key}")
    return tensors[key]


def read_tensors(name: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Read the tensors with `wanted` names of a hub name or folder, from one file or shards."""
    folder = fetch(name, *MODEL_FILES)
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists():
        return load_tensors(single, wanted)
    if not index.exists():
        raise FileNotFoundError(_no_safetensors(name, folder))
    tensors: dict[str, Tensor] = {}
    for file in _shards(index):
        tensors |= load_tensors(folder / file, wanted)
    return tensors


def _shards(index: Path) -> list[str]:
    """Return the files that an index names. Raises ValueError if it is damaged."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        # The index comes from elsewhere: it must not make us read any other file of this machine.
        outside = [file for file in names if Path(file).name != file or file == ".."]
        if outside:
            raise ValueError(f"{outside[0]!r} is not the name of a file beside it")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    return names


def _no_safetensors(name: str, folder: Path) -> str:
    suffixes = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    pickles = sorted(file.name for suffix in suffixes for file in folder.glob(suffix))
    found = f"; pickles ({', '.join(pickles)}) can run code and are not read" if pickles else ""
    return (
        f"{name} has no model.safetensors or model.safetensors.index.json{found}: save it again "
        "with transformers' save_pretrained, which writes safetensors"
    )


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Resize (1, P, C) position embeddings of a square grid to (1, grid * grid, C).

    Bicubic, without anti-aliasing, as transformers does.
    """
    side = math.isqrt(positions.shape[1])
    if side == grid:
        return positions
    square = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return square.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)


def extend_rows(table: Tensor, rows: int) -> Tensor:
    """Extend (V, C) to (rows, C). New entries start at nanoVLM's N(0, 0.02)."""
    if rows <= len(table):
        return table
    new = NANOVLM_STD * torch.randn(rows - len(table), table.shape[1])
    return torch.cat([table.float(), new])
