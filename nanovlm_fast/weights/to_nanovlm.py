"""Writing a folder that nanoVLM loads (`export --to nanovlm`): the release that has such models.

That is v0.1 for models with one square per image and its prompt; for models with tokens that stand
for images, the releases after it.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.text import Tokenizer, is_hub_name
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.folder import V01_FIELDS, derived_fields, fields_to_store

# Fields of our VLMConfig that nanoVLM's does not have. Its constructor raises for unknown fields.
OWN_FIELDS = ("image_mean", "image_std", "init", "prompt")


def to_nanovlm(
    folder: Path,
    model: VisionLanguageModel,
    tokenizer: Tokenizer | None = None,
    name: str = "",
) -> None:
    """Write config.json, model.safetensors and the tokenizer for nanoVLM's `from_pretrained`.

    nanoVLM feeds plain pixels in [0, 1], so the normalisation is folded into the patch embedding.
    Fields of its own in the config.json that the model was loaded from are written back.

    Args:
        tokenizer: needed if the model's tokenizer is not one of the hub's, as nanoVLM loads
            tokenizers by name.
        name: what that tokenizer will be loaded by (default: the absolute path of `folder`).

    Raises:
        ValueError: if such a tokenizer is not given.
    """
    config = model.config
    values = fields_to_store(config)
    for field in OWN_FIELDS:
        del values[field]
    # All checks come before the first file is written.
    if not is_hub_name(config.lm_tokenizer):
        if tokenizer is None:
            raise ValueError(
                f"{folder}: nanoVLM loads a tokenizer by its name, and the model's is its own "
                f"(lm_tokenizer is {config.lm_tokenizer!r}): give it (tokenizer=) to be written too"
            )
        values["lm_tokenizer"] = name or str(folder.resolve())
    if not config.lm_chat_template and config.prompt != VLMConfig.prompt:
        # v0.1's prompt is in its code. The weights are right, but answers will be worse.
        warnings.warn(
            f"nanoVLM's prompt is {VLMConfig.prompt!r}, this model's {config.prompt!r}",
            stacklevel=2,
        )
    state = {
        key: tensor.detach().cpu().contiguous()
        for key, tensor in model.reference_state_dict().items()
    }
    fold_normalisation(state, config)
    if config.lm_tie_weights:
        del state["decoder.head.weight"]  # safetensors refuses two names of one memory
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    origin = origin_of(model)
    (folder / "config.json").write_text(json.dumps({**origin, **values}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def origin_of(model: VisionLanguageModel) -> dict[str, Any]:
    """The fields that nanoVLM has and we do not, as the model's generation of it takes them."""
    known = V01_FIELDS
    derived: dict[str, Any] = {}
    if model.config.vlm_extra_tokens:
        # v0.1 alone has lm_eos_token_id; the constructors after it raise for it.
        known = (V01_FIELDS | {"hf_repo_name"}) - {"lm_eos_token_id"}
        derived = derived_fields(model.config)
    kept = {key: value for key, value in model.extra_config.items() if key in known}
    return {**kept, **derived}


def fold_normalisation(state: dict[str, Tensor], config: VLMConfig) -> None:
    """Change the patch embedding in `state` so that it takes plain pixels in [0, 1].

    W (x - mean) / std + b = (W / std) x + (b - mean / std * sum(W)). The bias comes first, as it
    needs the weight before the division. New tensors are made: `state` may share the model's.
    """
    conv = "vision_encoder.patch_embedding.conv"
    weight = state[f"{conv}.weight"]
    offset = config.image_mean / config.image_std * weight.sum((1, 2, 3))
    state[f"{conv}.bias"] = state[f"{conv}.bias"] - offset
    state[f"{conv}.weight"] = weight / config.image_std
