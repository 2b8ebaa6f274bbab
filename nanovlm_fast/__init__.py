"""nanovlm_fast: nanoVLM's small vision-language model, trained as fast as the hardware allows."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["VisionLanguageModel"]


def __getattr__(name: str) -> Any:
    """`nanovlm_fast.VisionLanguageModel`, imported when asked for: the package itself comes without torch."""
    if name == "VisionLanguageModel":
        from nanovlm_fast.model import VisionLanguageModel

        return VisionLanguageModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
