"""Pretrained weights to start a run from: SigLIP towers, Llama-architecture language models, whole checkpoints.

The sizes come from the source's config.json before the model is built (`pretrained_fields`), the weights from its
safetensors after (`load_pretrained_weights`). Two things may differ from the source: the image size, for which the
position embeddings are resized, and the vocabulary, which may have more rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm_fast.config import TrainConfig, VLMConfig, check_types
from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.files import read_json
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.folder import check_sizes, read_config, resolve
from nanovlm_fast.weights.hub import WEIGHTS, fetch, reason
from nanovlm_fast.weights.names import LANGUAGE_FIELDS, VISION_FIELDS, language_names, vision_names
from nanovlm_fast.weights.tensors import load_tensors

# what a run may set otherwise than its source: the first two are adapted to, the others are no sizes of weights
FREE = frozenset(
    "vit_img_size lm_vocab_size lm_max_position_embeddings lm_max_length lm_tokenizer image_mean image_std init "
    "prompt".split()
)


# ---- sizes
def pretrained_fields(
    train: TrainConfig, defaults: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(defaults of options that the sources in `train` bring, the fields that a run with them must have).

    A source that is the preset's own (`defaults`) leaves the preset's normalisation and tokenizer as they are. Raises
    ValueError, naming the source, for an architecture that the model here is not, and OSError if it cannot be had.
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
    return brought, must


def check_fields(model: VLMConfig, must: dict[str, Any]) -> None:
    """Raise ValueError naming the first option that the pretrained weights do not allow."""
    for name, value in must.items():
        flag, chosen = f"--{name.replace('_', '-')}", getattr(model, name)
        if name not in FREE and chosen != value:
            raise ValueError(f"{flag} {chosen}: the pretrained weights have {value}")
        if name == "lm_vocab_size" and chosen < value:
            raise ValueError(
                f"{flag} {chosen}: the pretrained weights have {value} rows, and none may be dropped"
            )
    if "lm_tokenizer" in must and model.lm_tokenizer == "train":
        raise ValueError(
            "--lm-tokenizer train: pretrained embeddings mean nothing under a new tokenizer; name the folder of theirs"
        )


def check_tokenizer(chosen: str, trained: str) -> None:
    """Raise ValueError where an id means another text in the tokenizer `chosen` than in the one of the embeddings.

    Either may have more ids, and ids of its own for added tokens: reserved ones are renamed, new ones get new rows.
    Nothing is said where `trained` cannot be had: weights often come without, or offline.
    """
    if trained == "train":  # it was made from data, and lies nowhere
        return
    try:
        theirs = meanings(Tokenizer.from_hub(trained))
    except (OSError, ValueError):
        return
    ours = meanings(Tokenizer.from_hub(chosen))
    common = sorted(theirs.keys() & ours.keys())
    if differ := [i for i in common if theirs[i] != ours[i]]:
        what = f"{len(differ)} of {len(common)} ids mean something else, the first, {differ[0]}, {ours[differ[0]]!r}"
        raise ValueError(
            f"--lm-tokenizer {chosen}: {what} and not {theirs[differ[0]]!r} as the pretrained embeddings have it; "
            f"theirs is {trained}"
        )


def meanings(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens of a vocabulary by id, without those that were added to it."""
    added = tokenizer.base.get_added_tokens_decoder()
    return {i: token for token, i in tokenizer.base.get_vocab().items() if i not in added}


def checkpoint_fields(name: str) -> dict[str, Any]:
    folder = resolve(name)
    config, _ = read_config(folder)
    check_sizes(folder, config)
    fields = dict(vars(config))
    if (folder / "tokenizer.json").exists():
        fields["lm_tokenizer"] = str(folder.resolve())
    return fields


def vision_fields(name: str) -> dict[str, Any]:
    config = hub_config(name)
    check_plain_weights(f"--vision {name}", config)
    config = getattr(config, "vision_config", config)
    wanted = {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
    }
    wanted |= {"attention_dropout": 0.0}
    check_architecture(f"--vision {name}", "a SigLIP tower of one resolution", config, wanted)
    fields = {ours: getattr(config, theirs) for ours, theirs in VISION_FIELDS.items()}
    return {**fields, **normalisation(name)}


def normalisation(name: str) -> dict[str, float]:
    """image_mean and image_std of a tower, from its preprocessor_config.json if it has one.

    Raises ValueError for what one mean and one deviation of all colours cannot express.
    """
    file = fetch(name, "config.json", "preprocessor_config.json") / "preprocessor_config.json"
    values = read_json(file) if file.exists() else {}
    found = {"image_mean": [0.5], "image_std": [0.5]}  # as all of Google's SigLIP
    if values.get("do_normalize") is False:
        found = {"image_mean": [0.0], "image_std": [1.0]}
    else:
        found |= {key: values[key] for key in found if values.get(key) is not None}
    found = {key: each if isinstance(each, list) else [each] for key, each in found.items()}
    scale = values.get("rescale_factor", 1 / 255)
    numbers = [*found["image_mean"], *found["image_std"], scale]
    if not all(type(number) in (int, float) for number in numbers):
        said = f"{found}, rescale_factor {scale!r}"
        raise ValueError(f"--vision {name}: {file.name} is damaged: {said}")
    alike = all(len(set(each)) == 1 for each in found.values())
    if not alike or values.get("do_rescale") is False or abs(scale * 255 - 1) > 1e-3:
        raise ValueError(
            f"--vision {name}: {file.name} normalises in a way that the model here does not: it "
            "takes pixels in [0, 1], with one image_mean and image_std for all colours"
        )
    return {key: float(each[0]) for key, each in found.items()}


def language_fields(name: str) -> dict[str, Any]:
    config = hub_config(name)
    check_plain_weights(f"--language {name}", config)
    wanted = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    wanted |= {"attention_dropout": 0.0}
    check_architecture(f"--language {name}", "a Llama-architecture model", config, wanted)
    rope = config.rope_parameters
    plain = {"rope_type": "default", "head_dim": config.hidden_size // config.num_attention_heads}
    found = {"rope_type": rope.get("rope_type", "default"), "head_dim": config.head_dim}
    if found != plain:
        raise ValueError(f"--language {name}: {found}, the model here has {plain}")
    fields = {ours: getattr(config, theirs) for ours, theirs in LANGUAGE_FIELDS.items()}
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    return {**fields, "lm_re_base": float(rope["rope_theta"]), "lm_tokenizer": place}


def hub_config(name: str) -> Any:
    """The configuration of a hub name or folder, as a transformers object: what it leaves out has its default."""
    folder = fetch(name, "config.json")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{name}: there is no config.json in it")
    from transformers import AutoConfig

    try:
        read_json(folder / "config.json")
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers raises whatever a value that it did not expect leads to
        raise ValueError(
            f"{name}: config.json is not one that transformers reads: {reason(error)}"
        ) from error


def check_plain_weights(option: str, config: Any) -> None:
    if getattr(config, "quantization_config", None):  # weights mean nothing without their scales
        raise ValueError(f"{option} is quantised (quantization_config): weights are read plain")


def check_architecture(option: str, what: str, config: Any, wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if getattr(config, key, None) != value:
            raise ValueError(
                f"{option} is not {what}: its {key} is {getattr(config, key, None)!r}, not {value!r}"
            )


# ---- weights
def load_pretrained_weights(model: VisionLanguageModel, train: TrainConfig) -> None:
    """Copy the weights that `train` names into `model`, in place; parts that no source has stay as they are.

    Raises ValueError naming missing and misshapen weights, and sources without safetensors.
    """
    state: dict[str, Tensor] = {}
    if train.start_from:
        folder = resolve(train.start_from)
        _, model.extra_config = read_config(folder)
        state |= load_tensors(folder / "model.safetensors")
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
    if (
        model.config.lm_tie_weights
    ):  # one tensor: under either name in the source, under both in the model
        head = state.pop("decoder.head.weight", None)
        if head is not None:
            state.setdefault("decoder.token_embedding.weight", head)
        del ours["decoder.head.weight"]
    model.load_reference_state_dict({**ours, **state})


def vision_weights(name: str, config: VLMConfig) -> dict[str, Tensor]:
    """A SigLIP tower under the reference's names; text tower and pooling head are left out."""
    tensors = read_tensors(name, lambda key: not key.startswith(("text_model.", "logit_")))
    tensors = {key.removeprefix("vision_model."): tensor for key, tensor in tensors.items()}
    state = {}
    for ours, theirs in vision_names(config.vit_n_blocks).items():
        state[f"vision_encoder.{ours}"] = torch.cat([_take(tensors, key, name) for key in theirs])
    key = "vision_encoder.patch_embedding.position_embedding"
    state[key] = state[key][None]
    return state


def language_weights(name: str, config: VLMConfig) -> dict[str, Tensor]:
    """A Llama-architecture model under the reference's names."""
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
    """Tensors of a hub name's or folder's model.safetensors, one file or sharded, whose names are `wanted`."""
    folder = fetch(name, *WEIGHTS)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            if outside := [file for file in names if Path(file).name != file or file == ".."]:
                raise ValueError(f"{outside[0]!r} is not the name of a file beside it")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{index} is damaged: {error!r}") from error
        files = [folder / file for file in names]
    else:
        pickles = [
            file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind)
        ]
        raise FileNotFoundError(
            f"{name} has no model.safetensors or model.safetensors.index.json"
            + (
                f"; pickles ({', '.join(sorted(pickles))}) can run code and are not read:"
                if pickles
                else ":"
            )
            + " save it again with transformers' save_pretrained, which writes safetensors"
        )
    return {key: tensor for file in files for key, tensor in load_tensors(file, wanted).items()}


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, P, C) position embeddings of a square grid -> (1, grid * grid, C), bicubic in both directions."""
    side = math.isqrt(positions.shape[1])
    if side == grid:
        return positions
    square = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return square.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)


def extend_rows(table: Tensor, rows: int) -> Tensor:
    """(V, C) -> (rows, C): new entries of the vocabulary start at nanoVLM's N(0, 0.02)."""
    if rows <= len(table):
        return table
    return torch.cat([table.float(), 0.02 * torch.randn(rows - len(table), table.shape[1])])
