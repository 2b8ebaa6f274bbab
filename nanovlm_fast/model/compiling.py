"""How the model is compiled: torch.compile's mode (`--compile`), Inductor's options (`--inductor`).

The options change how generated code is made and never what it computes in which type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Name of an option of train.py -> what it sets in torch._inductor.config.
INDUCTOR: dict[str, dict[str, Any]] = {
    # Launches of generated kernels that do not depend on each other become one.
    "combo_kernels": {"combo_kernels": True},
    # Programmatic dependent launch: a kernel begins while the one before it ends.
    "dependent_launch": {"triton.enable_pdl": True},
    # Tile sizes of generated kernels, found by timing them.
    "coordinate_descent": {"coordinate_descent_tuning": True},
    # Products as Triton templates, whose epilogues take in what follows, where these are faster.
    "max_autotune": {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"},
}


def inductor_names(text: str) -> tuple[str, ...]:
    """The names in a value of --inductor; none for `auto`, which the tuner has replaced by then.

    Raises ValueError for an unknown name.
    """
    if text in ("auto", "none"):
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in INDUCTOR]:
        there = ", ".join(INDUCTOR)
        raise ValueError(f"--inductor {','.join(unknown)}: there are auto, none, {there}")
    return names


def compile_options(mode: str, inductor: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arguments of torch.compile for one graph of static shapes."""
    static: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if not inductor:
        return {**static, "mode": mode}
    # torch.compile takes a mode or options, and a mode is nothing but options.
    from torch._inductor import list_mode_options

    options = dict(list_mode_options(mode, dynamic=False))
    for name in inductor:
        options |= INDUCTOR[name]
    return {**static, "options": options}


def compiled(function: Callable, mode: str, inductor: tuple[str, ...] = ()) -> Callable:
    """Return `function` compiled into one graph of static shapes; itself with mode "none"."""
    if mode == "none":
        return function
    return torch.compile(function, **compile_options(mode, inductor))


def print_nodes_by_name() -> None:
    """Let Inductor print a node that runs a kernel of ours as its name alone.

    It prints what the node reads as well, and what that reads. PyTorch 2.11 formats such nodes
    while it compiles: with kernels in every layer, that took longer than anybody waits.
    """
    from torch._inductor.ir import ExternKernel

    def by_name(self: ExternKernel) -> str:
        return f"{type(self).__name__}({self.name})"

    ExternKernel.__str__ = by_name  # type: ignore[method-assign]
    ExternKernel.__repr__ = by_name  # type: ignore[assignment, method-assign]
