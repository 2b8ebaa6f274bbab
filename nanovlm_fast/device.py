"""Where to compute, and in which type."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


def pick_device(name: str = "auto") -> torch.device:
    """The device of a --device option; 'auto' is a GPU where there is one. Raises ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return device


def pick_autocast(dtype: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Makes the context to compute in: bfloat16 on a GPU that has it ('auto'), float32 elsewhere.

    What computes in which type under it is the README's section "Precision".
    """
    fits = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" or (dtype == "auto" and fits):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext
