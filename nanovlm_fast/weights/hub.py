"""The Hugging Face hub: fetching folders and uploading exports.

Everything else in `weights` works on local folders.
"""

from __future__ import annotations

import re
from pathlib import Path

MODEL_FILES = ("*.json", "*.safetensors")  # patterns; a pickle is never downloaded


def fetch(name: str, *patterns: str) -> Path:
    """Return the local folder `name`, or a cached copy of that hub repository.

    Only top-level files that match `patterns` are downloaded. Raises FileNotFoundError if `name`
    is neither a folder nor a hub name, and OSError if the hub does not provide it. Both messages
    are one line; the second says how to use a local copy.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"{name!r}: no such folder, and not a hub name (OWNER/NAME)")
    # Imported here: a training step must not need the package.
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        why = reason(error)
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set and its cache does not have it"
        raise OSError(
            f"{name!r}: no such folder, and the Hugging Face hub did not provide it: {why}. "
            f"Without access to the hub, give a folder; `hf download {name} --local-dir FOLDER` "
            "makes one on another machine"
        ) from error


def reason(error: Exception) -> str:
    """Return the first sentence of an error, on one line."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def push_to_hub(folder: Path, repo: str, private: bool = False) -> str:
    """Upload an exported folder and return its address.

    Raises OSError with a one-line message if the hub does not accept it. The folder stays.
    """
    from huggingface_hub import HfApi

    # The error of whichever HTTP client this version of huggingface_hub uses.
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        address = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload from nanovlm_fast"
        )
    except (OSError, ValueError, HTTPError) as error:  # HTTPError: without a network
        raise OSError(
            f"{folder} is written, but the Hugging Face hub did not accept it as {repo!r}: "
            f"{reason(error)}. Run `hf auth login` once, then `hf upload {repo} {folder}`"
        ) from error
    return str(address)
