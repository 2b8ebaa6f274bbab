"""The Hugging Face hub: folders that come from it, model cards and uploads. All else here works on local folders."""

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


def push_to_hub(folder: Path, repo: str, private: bool = False) -> str:
    """Upload an exported folder; returns its address. Raises OSError, in one line, if the hub does not take it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the HTTP client that this version of it uses

    api = HfApi()
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Upload from nanovlm_fast"
            )
        )
    except (OSError, ValueError, HTTPError) as error:  # the last is what a missing network raises
        raise OSError(
            f"{folder} is written, but the Hugging Face hub did not take it as {repo!r}: {reason(error)}. "
            f"`hf auth login` once, then `hf upload {repo} {folder}`"
        ) from error
