"""Loading models, and the model as users meet it: `nanovlm_fast.VisionLanguageModel`.

It is the packed model with the two methods that nanoVLM's users know.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model import packed
from nanovlm_fast.weights.adapter import is_adapter
from nanovlm_fast.weights.backbones import checkpoint_weights
from nanovlm_fast.weights.folder import (
    check_sizes,
    read_config,
    resolve,
    save_pretrained,
    tokenizer_of,
)
from nanovlm_fast.weights.to_nanovlm import to_nanovlm


class VisionLanguageModel(packed.VisionLanguageModel):
    """The packed model, with methods to load and save a checkpoint.

    A subclass, because imports run one way: the code that reads and writes model folders imports
    the model, so the model cannot import that code.
    """

    @classmethod
    def from_pretrained(
        cls, checkpoint: Path | str, device: str | torch.device = "cpu"
    ) -> VisionLanguageModel:
        """Load the model of a checkpoint in float32: a folder, a run, or a hub name.

        Raises what `load_pretrained` raises; that function also returns the tokenizer.
        """
        return load_model(resolve(checkpoint)).to(device)

    def save_pretrained(
        self,
        folder: Path | str,
        layout: str = "nanovlm_fast",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Write config.json, model.safetensors and, if given, the tokenizer into `folder`.

        Existing files are replaced. Layout "nanovlm_fast" keeps every field of the configuration.
        Layout "nanovlm" is for nanoVLM's own `from_pretrained` (see `to_nanovlm`). Raises
        ValueError for any other layout, and for "nanovlm" if the model has a tokenizer of its own
        that is not given.
        """
        layouts = {"nanovlm_fast": save_pretrained, "nanovlm": to_nanovlm}
        if layout not in layouts:
            raise ValueError(f"layout {layout!r}: there are {', '.join(layouts)}")
        layouts[layout](Path(folder), self, tokenizer)


def load_pretrained(
    checkpoint: Path | str | None = None, device: str | torch.device = "cpu", lm_tokenizer: str = ""
) -> tuple[VisionLanguageModel, Tokenizer]:
    """Load model and tokenizer of a model folder, a run (its newest checkpoint), or a hub name.

    Args:
        checkpoint: see `resolve`; None is the latest run.
        lm_tokenizer: hub name or folder of a tokenizer to use. The default is the folder's own,
            and if it has none, the one that its config.json names.

    Raises:
        FileNotFoundError: if there is no such checkpoint or tokenizer.
        ValueError: naming the file or the weights, if something is damaged, is not supported, or
            does not fit the configuration.
    """
    folder = resolve(checkpoint)
    model = load_model(folder)
    tokenizer = tokenizer_of(folder, model.config, lm_tokenizer)
    if lm_tokenizer:
        model.config = dataclasses.replace(model.config, lm_tokenizer=lm_tokenizer)
    return model.to(device), tokenizer


def load_model(folder: Path) -> VisionLanguageModel:
    """Load the model of a folder on the CPU, with an adapter merged into its base.

    Raises what `load_pretrained` raises.
    """
    config, extra = read_config(folder)
    # Before the model is built: this takes its memory. An adapter's sizes are checked with those of
    # its base.
    if not is_adapter(folder):
        check_sizes(folder, config)
    weights = checkpoint_weights(folder)
    model = VisionLanguageModel(config)
    model.extra_config = extra
    model.load_reference_state_dict(weights)
    return model
