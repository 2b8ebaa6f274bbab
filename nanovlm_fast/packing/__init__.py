"""Packing: documents and samples, the packer that fills batches with them, and the batches."""

from typing import Any

# The names that this module had as a single file; code outside the project may import them
_HOME = {
    "IGNORE": "documents",
    "Document": "documents",
    "Sample": "documents",
    "Budget": "packer",
    "Packer": "packer",
    "PackedBatch": "batch",
    "PaddedBatch": "batch",
    "pack": "batch",
    "pad": "batch",
}


def __getattr__(name: str) -> Any:
    """Import a name from the file that it is in now.

    Done on request: `batch` imports torch, which `documents` and `packer` work without.
    """
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
