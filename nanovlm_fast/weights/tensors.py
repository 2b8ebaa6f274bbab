"""Reading safetensors files: tensors, or only their shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def load_tensors(
    file: Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Read the tensors of a file whose names are `wanted`.

    Raises FileNotFoundError or ValueError, naming the file, if it is missing or damaged.
    """
    return _read(file, wanted, lambda tensors, name: tensors.get_tensor(name))


def stored_shapes(file: Path) -> dict[str, Tensor]:
    """Return a file's tensors without values, on the meta device. Only the header is read."""

    def shape_of(tensors: Any, name: str) -> Tensor:
        return torch.empty(tensors.get_slice(name).get_shape(), device="meta")

    return _read(file, lambda name: True, shape_of)


def _read(
    file: Path, wanted: Callable[[str], bool], get: Callable[[Any, str], Tensor]
) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the checkpoint is not complete")
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            return {name: get(tensors, name) for name in names if wanted(name)}
    # A damaged header leads to any of these: a type that torch does not have is an AttributeError,
    # a shape whose product overflows an ArithmeticError.
    except (
        SafetensorError,
        ValueError,
        TypeError,
        RuntimeError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
