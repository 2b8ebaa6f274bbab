"""nanovlm_fast: nanoVLM's small vision-language model, trained as fast as the hardware allows."""

__version__ = "0.1.0"
