"""The model: the padded reference, the packed model, and the operations that both rest on."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`from nanovlm_fast.model import VisionLanguageModel`, from when this was one file."""
    if name == "VisionLanguageModel":
        import nanovlm_fast

        return nanovlm_fast.VisionLanguageModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
