"""What can be switched: a `Choice`, and the candidates for it in the order of expected gain.

A new kernel is one name in a line of `GPU_GROUPS`; a test holds that every kernel of
`model/ops.py` is in exactly one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovlm_fast.model.compiling import INDUCTOR
from nanovlm_fast.model.ops import KERNELS
from nanovlm_fast.threads import OPENMP, WAITING

# How OpenMP's threads may wait for each other, as environment variables. `bounded` is what our
# commands set by themselves.
WAITS = {
    "bounded": dict(OPENMP),
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "long": {"GOMP_SPINCOUNT": "300000"},  # GNU OpenMP's own
}

TYPES = ("auto", "bfloat16")


@dataclass(frozen=True)
class Choice:
    """How to compute. The defaults are plain PyTorch, and what the options' `auto` means there."""

    kernels: tuple[str, ...] = ()
    attention: str = "auto"
    vision_attention: str = "auto"
    inductor: tuple[str, ...] = ()  # names of `INDUCTOR`
    compile: str = "none"
    dtype: str = "auto"  # of `TYPES`; on a CPU only, where "auto" is float32
    # On a CPU only; 0 and -1 leave the number to the run.
    threads: int = 0
    waiting: str = "bounded"  # of `WAITS`
    workers: int = -1

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_json(cls, values: Any) -> Choice:
        """The choice that `to_json` wrote. Raises ValueError for anything else."""
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        if isinstance(values, dict):
            values = {"dtype": "auto", **values}  # there is none in what older versions wrote
        if not isinstance(values, dict) or values.keys() != fields.keys():
            raise ValueError("it holds no choice")
        read: dict[str, Any] = {}
        for name, default in fields.items():
            value = tuple(values[name]) if isinstance(default, tuple) else values[name]
            if type(value) is not type(default):
                raise ValueError(f"its {name} is {value!r:.40}")
            read[name] = value
        choice = cls(**read)
        unknown = {*choice.kernels} - {*KERNELS} or {*choice.inductor} - {*INDUCTOR}
        if unknown or choice.waiting not in WAITS or choice.dtype not in TYPES:
            named = ", ".join(map(str, unknown)) or f"{choice.waiting}, {choice.dtype}"
            raise ValueError(f"it names {named}")
        return choice

    @property
    def kernel_option(self) -> str:
        """The choice as a value of --kernels."""
        return ",".join(self.kernels) or "none"

    def environment(self) -> dict[str, str | None]:
        """OpenMP's variables for this choice; None for one that must not be set."""
        unset: dict[str, str | None] = dict.fromkeys(WAITING)
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        return {**unset, **WAITS[self.waiting], **threads}


@dataclass(frozen=True)
class Candidate:
    """One change of a choice, and the part of the model in which it is timed."""

    name: str
    part: str  # of `parts.py`; for a CPU "run"
    changes: tuple[tuple[str, Any], ...] = ()
    kernel: str = ""
    replaces: tuple[str, ...] = ()  # kernels that this one makes idle
    seconds: float = 0.0  # not begun with less: some take minutes to compile
    gated: bool = True  # whether it changes what is computed, and must be shown to be right

    def apply(self, choice: Choice) -> Choice:
        """The choice with this change."""
        changed: dict[str, Any] = dict(self.changes)
        if self.kernel:
            kept = [name for name in choice.kernels if name not in (self.kernel, *self.replaces)]
            changed["kernels"] = (*kept, self.kernel)
        if "inductor" in changed:
            changed["inductor"] = (*choice.inductor, *changed["inductor"])
        return dataclasses.replace(choice, **changed)


@dataclass(frozen=True)
class Group:
    """Rivals for one piece of work. `part` is where they are timed."""

    part: str
    kernels: tuple[str, ...] = ()
    backends: str = ""  # the option whose backends are rivals too


# In the order of expected gain (bench/NOTES.md). Within a group each is tried over the winner so
# far, and a kernel takes the place of the others of its group.
GPU_GROUPS = (
    Group("language", ("document_attention", "rotary"), "attention"),
    Group("vision", ("image_attention",), "vision_attention"),
    Group("vision", ("gelu_mlp",)),
    Group("language", ("swiglu_mlp", "swiglu")),
    Group("vision", ("layer_norm",)),
    Group("language", ("rms_norm",)),
    Group("ends", ("linear_cross_entropy",)),
    Group("ends", ("pixel_shuffle_proj",)),
    Group("ends", ("embed_splice",)),
    Group("update", ("adamw",)),
)
# What compiles by timing takes minutes.
INDUCTOR_SECONDS = {"coordinate_descent": 90.0, "max_autotune": 240.0}


def gpu_candidates(
    free: frozenset[str], compiled: bool, backends: Mapping[str, Sequence[str]] | None = None
) -> list[Candidate]:
    """The candidates on a GPU, in their order.

    Args:
        free: the options that may be chosen: kernels, attention, vision_attention, inductor,
            compile. What the user has set is not among them.
        compiled: whether the model is compiled, which Inductor's options need.
        backends: of `attention` and of `vision_attention`, those that can run here beside the one
            that `auto` takes.
    """
    found = []
    for group in GPU_GROUPS:
        for kernel in group.kernels:
            if kernel in KERNELS and "kernels" in free:
                others = tuple(name for name in group.kernels if name != kernel)
                found.append(Candidate(kernel, group.part, (), kernel, others))
        option = group.backends
        if option in free:
            values = (backends or {}).get(option, ())
            found += [Candidate(f"{option} {v}", group.part, ((option, v),)) for v in values]
    if compiled and "inductor" in free:
        for name in INDUCTOR:
            seconds = INDUCTOR_SECONDS.get(name, 0.0)
            change = (("inductor", (name,)),)
            found.append(Candidate(name, "blocks", change, seconds=seconds))
    if "compile" in free:
        graphs = (("compile", "reduce-overhead"),)
        found.append(Candidate("CUDA graphs", "launches", graphs, gated=False))
    return found


def seen_by(part: str, choice: Choice) -> Choice:
    """What of a choice a tower or the ends compute by; all of it in other parts.

    What is compiled for a part is kept while choices elsewhere change.
    """
    kernels = {kernel for group in GPU_GROUPS if group.part == part for kernel in group.kernels}
    if not kernels:
        return choice
    usual = Choice()
    return dataclasses.replace(
        choice,
        kernels=tuple(name for name in choice.kernels if name in kernels),
        attention=choice.attention if part == "language" else usual.attention,
        vision_attention=choice.vision_attention if part == "vision" else usual.vision_attention,
    )


def cpu_candidates(free: frozenset[str], cores: int) -> list[Candidate]:
    """The candidates on a CPU, each timed in whole training steps; see `gpu_candidates`."""
    # First: where products are several times as fast, the rest weighs more.
    changes: list[tuple[str, str, Any]] = [("bfloat16", "dtype", "bfloat16")]
    counts = sorted({1, cores // 2, cores - 1} - {0, cores}, reverse=True)
    changes += [(f"{count} threads", "threads", count) for count in counts]
    changes += [(f"waiting {name}", "waiting", name) for name in WAITS if name != "bounded"]
    workers = (0, 2) if cores > 2 else (0,)
    changes += [(f"{count} workers", "workers", count) for count in workers]
    found = []
    for name, option, value in changes:
        if option in free:
            found.append(Candidate(name, "run", ((option, value),), gated=False))
    if "compile" in free:
        found.append(Candidate("compiled", "run", (("compile", "default"),), seconds=40.0))
    return found
