"""Types that say which values are allowed, and the check of a configuration's value against a type."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def is_finite(value: object) -> bool:
    """Whether a value is a number that a float can hold: a truth value is none, nor is a whole number of 400 digits."""
    if type(value) is float:
        return isfinite(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Interval:
    """The numbers between two bounds."""

    low: float = -inf
    high: float = inf
    open_low: bool = False

    def holds(self, number: Any) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        return bool(is_finite(number) and above and number <= self.high)

    def __str__(self) -> str:
        below = "" if self.low == -inf else f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        if self.high == inf:
            return below
        return f"between {self.low:g} and {self.high:g}" + (f", not {self.low:g}" if self.open_low else "")


Positive = Annotated[float, Interval(0, open_low=True)]
NonNegative = Annotated[float, Interval(0)]
Probability = Annotated[float, Interval(0, 1)]
Count = Annotated[int, Interval(1, 10**9)]  # what a machine can count to, and torch can take for a size
Natural = Annotated[int, Interval(0)]


def is_allowed(value: object, kind: Any) -> bool:
    """Whether a value is of a kind: int, float, str, bool, None, Literal, Annotated[number, Interval], a union, a
    sequence of one kind, or a class. A whole number is also a float, a truth value is never a number."""
    origin = get_origin(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        base, *bounds = get_args(kind)
        return is_allowed(value, base) and all(bound.holds(value) for bound in bounds if isinstance(bound, Interval))
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in get_args(kind))
    if origin in (Union, types.UnionType):
        return any(is_allowed(value, option) for option in get_args(kind))
    if kind is float:
        return is_finite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is None or kind is type(None):
        return value is None
    container = origin or kind
    if isinstance(container, type) and issubclass(container, Sequence) and container is not str:
        items = [item for item in get_args(kind) if item is not Ellipsis] or [Any]
        return isinstance(value, (list, tuple)) and all(is_allowed(item, items[0]) for item in value)
    return isinstance(value, container) if isinstance(container, type) else True


def describe(kind: Any) -> str:
    """Say in words which values a kind allows."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, *bounds = get_args(kind)
        return " ".join([describe(base), *(str(bound) for bound in bounds if isinstance(bound, Interval))]).strip()
    if origin is Literal:
        return _either([str(word) for word in get_args(kind)])
    if origin in (Union, types.UnionType):
        return _either([describe(option) for option in get_args(kind)])
    container = origin or kind
    if isinstance(container, type) and issubclass(container, Sequence) and container is not str:
        items = [item for item in get_args(kind) if item is not Ellipsis]
        return f"a list, each item {describe(items[0])}" if items else "a list"
    if isinstance(container, type) and issubclass(container, Mapping):
        return "several settings, as {train: true}"
    words = {float: "a number", int: "a whole number", str: "a word", bool: "true or false", type(None): "null"}
    if kind is None:
        return "null"
    return words.get(kind, f"a {kind.__name__.lower()}" if isinstance(kind, type) else str(kind))


def _either(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
