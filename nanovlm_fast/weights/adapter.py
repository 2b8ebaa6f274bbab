"""Checkpoints of a run with `--lora-rank`: what was trained, and the name and hash of its base.

`model.safetensors` then holds the adapters, the projector and, if it was trained, the vision tower;
`adapter.json` says which weights they belong to:

    {"rank": 8, "alpha": 16.0,
     "base": {"start_from": "", "vision": "...", "language": "...", "seed": 0},
     "hashes": {"vision_encoder": "...", "decoder": "..."}}
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovlm_fast.config import TrainConfig
from nanovlm_fast.files import read_json
from nanovlm_fast.model.lora import Adapter
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.ranges import SEED

ADAPTER = "adapter.json"
SOURCES = ("start_from", "vision", "language")
TOWERS = ("vision_encoder", "decoder")


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds an adapter, and not all weights of a model."""
    return (folder / ADAPTER).exists()


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write adapter.json into a model folder."""
    values = {name: getattr(adapter, name) for name in ("rank", "alpha", "base", "hashes")}
    (folder / ADAPTER).write_text(json.dumps(values, indent=2) + "\n")


def read_adapter(folder: Path) -> Adapter:
    """Read adapter.json. Raises ValueError naming the file if it is damaged."""
    file = folder / ADAPTER
    values = read_json(file)
    base: Any = values.get("base")
    hashes: Any = values.get("hashes")
    rank: Any = values.get("rank")
    alpha: Any = values.get("alpha")
    right = (
        type(rank) is int
        and rank > 0
        and type(alpha) in (int, float)
        and 0 < alpha < math.inf  # JSON's NaN and Infinity would be those of all merged weights
        and isinstance(base, dict)
        and base.keys() == {*SOURCES, "seed"}
        and all(isinstance(base[name], str) for name in SOURCES)
        and type(base["seed"]) is int
        and SEED.holds(base["seed"])
        and isinstance(hashes, dict)
        and hashes.keys() == {*TOWERS}
        and all(isinstance(one, str) for one in hashes.values())
    )
    if not right:
        raise ValueError(f"{file} is damaged: not what --lora-rank writes")
    return Adapter(rank, alpha, base, hashes)


def base_of(train: TrainConfig) -> dict[str, Any]:
    """What names the base of a run."""
    return {name: getattr(train, name) for name in (*SOURCES, "seed")}


def described(base: dict[str, Any]) -> str:
    """The base's name, for people."""
    return " and ".join(base[name] for name in SOURCES if base[name])


def hashes_of(model: VisionLanguageModel) -> dict[str, str]:
    """A SHA-256 over names, shapes and float32 values of each tower; without adapters in it."""
    hashes = {tower: hashlib.sha256() for tower in TOWERS}
    for name, weight in model.named_parameters():
        tower = name.split(".")[0]
        if tower in hashes:
            hashes[tower].update(f"{name} {tuple(weight.shape)}\n".encode())
            hashes[tower].update(_bytes_of(weight))
    return {tower: found.hexdigest() for tower, found in hashes.items()}


def _bytes_of(weight: Tensor) -> Any:
    values = weight.detach().to("cpu", torch.float32).contiguous().flatten()
    return values.view(torch.uint8).numpy()


def check_base(
    folder: Path, adapter: Adapter, found: dict[str, str], stored: dict[str, Tensor]
) -> None:
    """Raise ValueError if a tower that the folder takes from its base has changed.

    `found` are the hashes of the base as it is now, `stored` the folder's own weights.
    """
    for tower in TOWERS:
        # A tower that was trained is in the folder.
        own = tower != "decoder" and any(name.startswith(f"{tower}.") for name in stored)
        if not own and found[tower] != adapter.hashes[tower]:
            raise ValueError(
                f"{folder} is an adapter of {described(adapter.base)}, whose {tower} has changed "
                f"since ({found[tower][:12]}, not {adapter.hashes[tower][:12]}): it needs the "
                f"weights that it was trained on; {ADAPTER} names where they lie"
            )
