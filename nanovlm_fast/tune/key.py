"""What a measurement holds for: the device, the versions, the model, and how it is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

import nanovlm_fast.kernels
import nanovlm_fast.model
from nanovlm_fast.config import TrainConfig, VLMConfig
from nanovlm_fast.device import device_name, has_fast_bfloat16
from nanovlm_fast.packing.packer import Budget
from nanovlm_fast.threads import OPENMP, WAITING, cores_of

# Raised when the tuner itself changes what it measures.
TUNER = 2
# Fields of the model that change no shape and no operation.
UNTIMED = (
    "prompt",
    "lm_tokenizer",
    "lm_chat_template",
    "vlm_extra_tokens",
    "init",
    "lm_max_length",
    "image_mean",
    "image_std",
)
PACKAGES = ("triton", "flash-attn", "flash-attn-4", "quack-kernels")  # what candidates run on


def key_of(
    model: VLMConfig,
    train: TrainConfig,
    budget: Budget | None,
    device: torch.device,
    dtype: torch.dtype,
    several: bool,
) -> dict[str, Any]:
    """Everything that a choice depends on. `budget` is None where it does not (on a CPU)."""
    sizes = {k: v for k, v in dataclasses.asdict(model).items() if k not in UNTIMED}
    return {
        "tuner": TUNER,
        **device_facts(device),
        "torch": torch.__version__,
        **{name: version_of(name) for name in PACKAGES},
        "kernels": hash_of(Path(next(iter(nanovlm_fast.kernels.__path__)))),
        "modules": hash_of(Path(next(iter(nanovlm_fast.model.__path__)))),
        "model": sizes,
        "budget": dataclasses.asdict(budget) if budget else train.tokens_per_batch,
        "dtype": str(dtype).removeprefix("torch."),
        "stream": train.stream,
        "recompute": train.recompute,
        "trained": [name for name in ("projector", "vision", "language") if rate(train, name) > 0],
        "optimizer": train.optimizer,
        "clipped": train.clip > 0,
        # Only where there are adapters: what was measured before they were known still holds.
        **({"lora_rank": train.lora_rank} if train.lora_rank else {}),
        "several_processes": several,
        "sharded": train.shard and several,
        # What the user has set is not chosen, and what is chosen depends on it.
        "set": {name: getattr(train, name) for name in autos(device)},
    }


# The options that the tuner may choose, and the value by which each says so.
GPU_AUTOS: dict[str, Any] = {
    "kernels": "auto",
    "attention": "auto",
    "vision_attention": "auto",
    "inductor": "auto",
    "compile": "auto",
}
CPU_AUTOS: dict[str, Any] = {"compile": "auto", "workers": -1}
# On a CPU that has bfloat16 products.
TYPE_AUTO: dict[str, Any] = {"dtype": "auto"}


def autos(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return GPU_AUTOS
    if device.type == "cpu" and has_fast_bfloat16():
        return {**CPU_AUTOS, **TYPE_AUTO}
    return CPU_AUTOS


def free_in(key: dict[str, Any]) -> frozenset[str]:
    """The options that the key leaves to the tuner; on a CPU also what its environment does."""
    known = {**GPU_AUTOS, **CPU_AUTOS, **TYPE_AUTO}
    free = {name for name, value in key["set"].items() if value == known[name]}
    # Our commands bound the waiting by themselves: that is no wish of the user's.
    if "openmp" in key:
        given = {name: value for name, value in key["openmp"].items() if value}
        free |= set() if given.pop("OMP_NUM_THREADS", "") else {"threads"}
        free |= {"waiting"} if given in ({}, OPENMP) else set()
    return frozenset(free)


def rate(train: TrainConfig, part: str) -> float:
    return getattr(train, f"lr_{part}")


def device_facts(device: torch.device) -> dict[str, Any]:
    """What of the device and its drivers decides speeds."""
    if device.type != "cuda":
        openmp = {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", *WAITING)}
        # Without the threads, which are among what is chosen.
        name = device_name(device).rpartition(" (")[0]
        return {"device": name, "cores": cores_of(), "openmp": openmp}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "SMs": properties.multi_processor_count,
        "memory_GB": round(properties.total_memory / 1e9),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def driver_version() -> str:
    """The driver's version, from its kernel module or else from CUDA; empty if neither says."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"\s(\d+\.\d+[\d.]*)\s", text)
    if found:
        return found.group(1)
    read = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {read()}" if read else ""


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def hash_of(folder: Path) -> str:
    """A hash over the Python files of a folder: their names and bytes."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        content = file.read_bytes()
        found.update(f"{file.name} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()[:16]


def hash_of_key(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
