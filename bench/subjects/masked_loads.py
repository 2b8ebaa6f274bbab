"""How much of its inputs a generated pointwise kernel loads, where masks leave some out.

Inductor turns a concatenation into one kernel that loads every part under a mask. Its dependencies
know nothing of masks, so bytes counted from them alone would be too many. Here the kernel's index
arithmetic is run with NumPy on a sample of the output's elements, and the masks are counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

SAMPLE = 8192  # elements


class Lanes(np.ndarray):
    """What a Triton value is while a kernel is followed: methods that it lacks change nothing."""

    def to(self, *_: Any, **__: Any) -> Lanes:
        return self

    def __getattr__(self, name: str) -> Callable:
        return lambda *_, **__: self


def lanes(value: Any) -> Lanes:
    return np.asarray(value).view(Lanes)


class Pointer:
    """An argument of the kernel; an offset does not change which argument it is."""

    def __init__(self, name: str):
        self.name = name

    def __add__(self, offset: Any) -> Pointer:
        return self


class Anything:
    """A module of which every function returns zeros: its values decide nothing here."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape

    def __getattr__(self, name: str) -> Callable:
        return lambda *_, **__: lanes(np.zeros(self._shape, np.int64))


class Language(Anything):
    """`triton.language` as far as indices and masks need it; counts loads."""

    constexpr = int
    int1 = int8 = int16 = int32 = int64 = uint8 = float32 = bfloat16 = float16 = None

    def __init__(self, sample: np.ndarray):
        super().__init__(sample.shape)
        self._sample = sample
        self.loads: Counter[str] = Counter()

    def load(self, pointer: Pointer, mask: Any = None, *_: Any, **__: Any) -> Lanes:
        always = mask is None or isinstance(mask, str)
        share = 1.0 if always else float(np.broadcast_to(mask, self._shape).mean())
        self.loads[pointer.name] += share  # type: ignore[assignment]  # a Counter of shares
        return lanes(np.zeros(self._shape, np.int64))

    def program_id(self, axis: int) -> int:
        return 0

    def arange(self, start: int, stop: int) -> Lanes:
        return lanes(self._sample)

    def full(self, shape: list[int], value: Any, dtype: Any) -> Lanes:
        return lanes(np.full([length or 1 for length in shape], value))

    def where(self, mask: Any, a: Any, b: Any) -> Lanes:
        return lanes(np.where(mask, a, b))

    def broadcast_to(self, value: Any, shape: Any) -> Any:
        return value

    def store(self, *_: Any, **__: Any) -> None:
        pass

    atomic_add = device_assert = store


def loads_of(source: str, name: str) -> dict[str, float]:
    """Pointer of a pointwise kernel -> elements that it loads; {} if the kernel cannot be followed.

    Only kernels over one dimension are followed. Without an answer the dependencies' count holds,
    which is at most too large.
    """
    body = source[source.index("def " + name) :]
    sizes = dict(re.findall(r"^    (\w+numel) = (\d+)$", body, re.M))
    if set(sizes) != {"xnumel"} or "for " in body:
        return {}
    count = int(sizes["xnumel"])
    # Spread over the output by a large prime, so that no period of the layout hides elements.
    sample = np.sort(np.arange(SAMPLE, dtype=np.int64) * 1000003 % count)
    language = Language(sample)
    rest = Anything(sample.shape)
    space = dict(tl=language, libdevice=rest, tl_math=rest, triton_helpers=rest)
    arguments = arguments_of(body)
    try:
        with np.errstate(all="ignore"):
            # The body ends where the string that holds it in the generated module ends.
            exec("from __future__ import annotations\n" + body.split("'''")[0], space)
            kernel: Any = space[name]
            kernel(*(Pointer(a) if "ptr" in a else sample.size for a in arguments))
    except Exception:  # whatever this file does not know of Triton: the kernel is not followed
        return {}
    return {pointer: share * count for pointer, share in language.loads.items()}


def arguments_of(body: str) -> list[str]:
    """The argument names of the first function in the source."""
    found = re.search(r"def \w+\(([^)]*)\)", body)
    listed = found.group(1) if found else ""
    return listed.replace(": tl.constexpr", "").replace(" ", "").split(",")
