"""A folder that nanoVLM v0.1 loads."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

from safetensors.torch import save_file

from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data.text import Tokenizer, is_hub_name
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.folder import V01_FIELDS

NOT_NANOVLMS = (
    "image_mean",
    "image_std",
    "init",
    "prompt",
)  # fields of our VLMConfig that v0.1's does not have


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
    values = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in NOT_NANOVLMS
    }
    if not is_hub_name(config.lm_tokenizer):
        if tokenizer is None:
            raise ValueError(
                f"{folder}: nanoVLM loads a tokenizer by its name, and the model's is its own "
                f"(lm_tokenizer is {config.lm_tokenizer!r}): give it (tokenizer=) to be written too"
            )
        values["lm_tokenizer"] = name or str(folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    if config.prompt != VLMConfig.prompt:
        warnings.warn(
            f"nanoVLM's prompt is {VLMConfig.prompt!r}, this model's {config.prompt!r}",
            stacklevel=2,
        )
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.reference_state_dict().items()
    }
    conv = "vision_encoder.patch_embedding.conv."
    weight = state[f"{conv}weight"]
    state[f"{conv}bias"] = state[f"{conv}bias"] - config.image_mean / config.image_std * weight.sum(
        (1, 2, 3)
    )
    state[f"{conv}weight"] = weight / config.image_std
    if config.lm_tie_weights:
        del state["decoder.head.weight"]
    save_file(state, folder / "model.safetensors")
    extra = {name: value for name, value in model.extra_config.items() if name in V01_FIELDS}
    (folder / "config.json").write_text(json.dumps({**extra, **values}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)
