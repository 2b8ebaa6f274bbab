"""Which of PyTorch's operators MPS has, by the list that the installed PyTorch was built from.

`native_functions.yaml` names for every operator the backends with a kernel. On a machine without
MPS nothing else says so: its kernels are not compiled in.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LIST = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
# Kernels that are put together from other operators, on any device.
COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")


@cache
def operators() -> dict[str, tuple[frozenset[str], str]]:
    """Operator -> the backends that its entry names, and the operator whose kernel it shares."""
    found = {}
    for entry in re.split(r"^- func: ", LIST.read_text(), flags=re.MULTILINE)[1:]:
        name = entry[: entry.index("(")]
        keys = re.findall(r"^    ([A-Za-z, ]+): \w", entry, flags=re.MULTILINE)
        backends = frozenset(key.strip() for line in keys for key in line.split(","))
        shared = re.search(r"^  structured_delegate: (\S+)", entry, flags=re.MULTILINE)
        found[name] = (backends, shared.group(1) if shared else "")
    return found


def runs_on_mps(name: str) -> bool:
    """Whether MPS has the operator `name`, as in mm or add.Tensor."""
    backends, shared = operators()[name]
    if shared:
        backends = backends | operators()[shared][0]
    if any(key.startswith(COMPOSITE) for key in backends) or "MPS" in backends:
        return True
    # An entry without backends is put together from others, or made from its functional twin.
    return not backends and any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key) for key in COMPOSITE
    )


class Recorder(TorchDispatchMode):
    """Notes the operators that run, and the types of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.types: dict[torch.dtype, str] = {}  # and an operator that met it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func.name()  # aten::add.Tensor
        self.names.add(name)
        for value in tree_leaves((args, kwargs, results)):
            if isinstance(value, torch.Tensor):
                self.types.setdefault(value.dtype, name)
        return results
