"""Documents, the packer that fills batches with them, and the packed batch itself."""

from typing import Any

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
    """The names that this module had before it became a folder."""
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
