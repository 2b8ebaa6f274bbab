"""Ranges of numbers, types and names of tokens, for fields of configurations and options."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

INT32_MAX = 2**31 - 1  # positions and sizes are int32 on the device


@dataclass(frozen=True)
class Range:
    """The values that make sense for a number of one `kind`, int or float.

    NaN and infinity are never in a range. Whole numbers end at INT32_MAX unless `most` says
    otherwise. A Range is the `type` of an argparse option; inside `Annotated[int, Range(int)]` it
    is the range of a dataclass's field, which `check_fields` checks.
    """

    kind: type
    least: float | None = 0
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        least = self.least if self.above is None else None
        # `above` is the stricter of the two lower limits, so `least` is not worth naming beside it.
        limits = (
            ("of at least", least),
            ("above", self.above),
            ("up to", self._most),
            ("below", self.below),
        )
        words = [f"{word} {limit}" for word, limit in limits if limit is not None]
        number = "a whole number" if self.kind is int else "a finite number"
        return " ".join([number, " and ".join(words)]).strip()

    @property
    def _most(self) -> float | None:
        return INT32_MAX if self.kind is int and self.most is None else self.most

    def holds(self, value: float) -> bool:
        """Return whether `value` is in the range."""
        # Comparisons and not math.isfinite, which raises OverflowError for large integers. With NaN
        # every comparison is false.
        return (
            float("-inf") < value < float("inf")
            and (self.least is None or value >= self.least)
            and (self._most is None or value <= self._most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def read(self, name: str, text: str | float) -> Any:
        """Return the number in `text`. Raises ValueError, naming `name`, if it is out of range."""
        try:
            value = self.kind(text)
        except (ValueError, TypeError, OverflowError):
            value = float("nan")  # not a number: fails the check below, with the same message
        if not self.holds(value):
            raise ValueError(f"{name} must be {self}, got {text!r:.40}".strip())
        return value

    def __call__(self, text: str) -> Any:
        try:
            return self.read("", text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    def several(self, text: str) -> list[Any]:
        """The `type` of an option with several numbers, as in "1,4,2": sorted, without repeats."""
        return sorted({self(part) for part in text.split(",")})


SEED = Range(int, most=2**63 - 1)  # the random seeds that both torch and numpy accept


def check_fields(config: Any, option: bool) -> None:
    """Raise ValueError naming the first number of a dataclass that is out of its range.

    With `option`, fields are named as on the command line.
    """
    for name, allowed in ranges_of(type(config)).items():
        label = f"--{name.replace('_', '-')}" if option else name
        allowed.read(label, getattr(config, name))


def ranges_of(config_class: type) -> dict[str, Range]:
    """Return the range of each number of a dataclass: the annotated one, or the type's default."""
    ranges = {}
    for name, hint in get_type_hints(config_class, include_extras=True).items():
        if hint in (int, float):
            ranges[name] = Range(hint)
        elif get_origin(hint) is Annotated:
            ranges[name] = hint.__metadata__[0]
    return ranges


class BadTokenNames(ValueError, argparse.ArgumentTypeError):
    """Not an object of names and tokens. argparse prints the message of the latter class only."""


class TokenNames(dict[str, str]):
    """Names of special tokens and their text, in the order of their ids; as an option, JSON."""

    def __init__(self, names: Any = ()):
        try:
            super().__init__(json.loads(names) if isinstance(names, str) else names)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadTokenNames(f"a JSON object is needed, got {names!r:.40}") from error
        if not all(isinstance(part, str) for item in self.items() for part in item):
            raise BadTokenNames(f"names and tokens must be text, got {names!r:.40}")


def check_types(config_class: type, values: dict[str, Any]) -> None:
    """Raise ValueError naming the first entry of `values` that its field cannot hold.

    For values from a file: what comes from the command line has its type already.
    """
    kinds = get_type_hints(config_class)
    for name, value in values.items():
        kind = kinds[name]
        choices = get_args(kind)  # of a Literal
        if kind is TokenNames:
            right = isinstance(value, dict) and all(
                isinstance(part, str) for item in value.items() for part in item
            )
        elif choices:
            right = value in choices
        elif kind is float:
            # JSON writes 1.0 as 1 in other languages, and Python reads NaN and Infinity from it.
            right = type(value) in (int, float) and math.isfinite(value)
        else:
            right = type(value) is kind  # not isinstance: True is an int
        if not right:
            wanted = f"one of {', '.join(choices)}" if choices else f"of type {kind.__name__}"
            raise ValueError(f"{name} must be {wanted}, got {repr(value)[:80]}")
