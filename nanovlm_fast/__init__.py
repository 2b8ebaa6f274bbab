"""nanovlm_fast: nanoVLM's small vision-language model, trained as fast as the hardware allows.

The public name is `VisionLanguageModel`, with `from_pretrained` and `save_pretrained`.
"""

import sys
from typing import Any

from nanovlm_fast.command import begin

__version__ = "0.1.0"
__all__ = ["VisionLanguageModel"]

# While `python -m nanovlm_fast.<command>` imports this package, argv[0] is "-m". A program that
# imports the package keeps its own handling of Ctrl-C and its environment.
begin(sys.argv[:1] == ["-m"])


def __getattr__(name: str) -> Any:
    """Import `nanovlm_fast.VisionLanguageModel` on first use.

    Importing the package itself must not import torch, which takes seconds: a command prints its
    help and its errors without it.
    """
    if name == "VisionLanguageModel":
        from nanovlm_fast.weights.pretrained import VisionLanguageModel

        return VisionLanguageModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
