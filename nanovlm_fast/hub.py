"""The Hugging Face hub: folders that come from it. Everything else here reads local folders."""

from __future__ import annotations

import re
from pathlib import Path

WEIGHTS = ("*.json", "*.safetensors")


def fetch(name: str, *patterns: str) -> Path:
    """The local folder `name`, or a cached copy of that hub repository's top-level files that match `patterns`.

    Raises FileNotFoundError if `name` can only be a folder and there is none, and OSError if the hub does not give it.
    Either message is one line that says how to point to a local copy.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{name!r}: no such folder, and not a hub name (OWNER/NAME)")
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        offline = "HF_HUB_OFFLINE is set and its cache does not have it"
        raise OSError(
            f"{name!r}: no such folder, and the Hugging Face hub did not give it: "
            f"{offline if constants.HF_HUB_OFFLINE else reason(error)}. Where the hub is out of reach give a folder; "
            f"`hf download {name} --local-dir FOLDER` makes one elsewhere"
        ) from error


def reason(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
