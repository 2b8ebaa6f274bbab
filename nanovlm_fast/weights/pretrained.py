"""The model as users meet it: `VisionLanguageModel.from_pretrained` and `.save_pretrained`."""

from __future__ import annotations

from pathlib import Path

import torch

from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model import packed
from nanovlm_fast.weights.folder import load_model, resolve, save_pretrained
from nanovlm_fast.weights.to_nanovlm import to_nanovlm


class VisionLanguageModel(packed.VisionLanguageModel):
    """The packed model, with nanoVLM's way to load and save a checkpoint.

    It is a class of its own because the model itself must not import the code that reads and
    writes model folders: that code imports the model.
    """

    @classmethod
    def from_pretrained(
        cls, checkpoint: Path | str, device: str | torch.device = "cpu"
    ) -> VisionLanguageModel:
        """Load the model of a checkpoint in float32: a folder, a run, or a hub name.

        Raises what `weights.folder.load_pretrained` raises. That function returns the tokenizer too.
        """
        return load_model(resolve(checkpoint), cls).to(device)

    def save_pretrained(
        self,
        folder: Path | str,
        layout: str = "nanovlm_fast",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Write config.json, model.safetensors and, if given, the tokenizer into `folder`.

        Existing files are replaced. Layout "nanovlm_fast" keeps every field of the configuration.
        Layout "nanovlm" is what nanoVLM v0.1's own `from_pretrained` reads (`to_nanovlm`). Raises
        ValueError for another layout, and for "nanovlm" if the model's tokenizer was made from its
        training data and is not given.
        """
        layouts = {"nanovlm_fast": save_pretrained, "nanovlm": to_nanovlm}
        if layout not in layouts:
            raise ValueError(f"layout {layout!r}: there are {', '.join(layouts)}")
        layouts[layout](Path(folder), self, tokenizer)
