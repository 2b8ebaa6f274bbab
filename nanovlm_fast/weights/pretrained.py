"""`nanovlm_fast.VisionLanguageModel`: the packed model, with `from_pretrained` and the like.

Both methods have the names that nanoVLM's users know.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nanovlm_fast.data.text import Tokenizer
from nanovlm_fast.model import packed
from nanovlm_fast.weights.folder import load_model, resolve, save_pretrained
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

        Raises what `weights.folder.load_pretrained` raises; that function also returns the
        tokenizer.
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
        Layout "nanovlm" is for nanoVLM v0.1's own `from_pretrained` (see `to_nanovlm`). Raises
        ValueError for any other layout, and for "nanovlm" if the model has a tokenizer of its own
        that is not given.
        """
        layouts = {"nanovlm_fast": save_pretrained, "nanovlm": to_nanovlm}
        if layout not in layouts:
            raise ValueError(f"layout {layout!r}: there are {', '.join(layouts)}")
        layouts[layout](Path(folder), self, tokenizer)
