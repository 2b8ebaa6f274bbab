"""nanovlm_fast: nanoVLM's small vision-language model, trained as fast as the hardware allows."""

import sys
from typing import Any

from nanovlm_fast.command import end_on_interrupt

__version__ = "0.1.0"
__all__ = ["VisionLanguageModel"]

end_on_interrupt(
    sys.argv[:1] == ["-m"]
)  # of `python -m nanovlm_fast.<command>`, and of nobody else


def __getattr__(name: str) -> Any:
    """`nanovlm_fast.VisionLanguageModel`, imported when asked for: the package itself comes without torch."""
    if name == "VisionLanguageModel":
        from nanovlm_fast.weights.pretrained import VisionLanguageModel

        return VisionLanguageModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
