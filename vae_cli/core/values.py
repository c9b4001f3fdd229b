"""Types that define the allowed values of a setting, and functions that check a value against a type."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number; booleans and integers too large for a float are rejected.

    >>> is_finite(3), is_finite(float("inf")), is_finite(True), is_finite(10**400)
    (True, False, False, False)
    """
    if type(value) is float:
        return isfinite(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:
        return False


LARGEST = 3.4028234663852886e38  # of float32, in which models compute
LONGEST = 4096  # characters of a text


def flaw(value: object) -> str | None:
    """Return why a setting cannot have this value, whatever its type, or None if it can.

    Numbers must be finite in float32, keys must be text, and texts must be UTF-8 and not too long; in lists and
    mappings, too.

    >>> flaw(1e308), flaw([1, float("nan")]), flaw({"a": None})
    ('its absolute value is above 3.4e+38, the largest number of float32', 'it is not a finite number', None)
    """
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            return f"its key {next(key for key in value if not isinstance(key, str))!r} is not text"
        return next((why for item in (*value, *value.values()) if (why := flaw(item)) is not None), None)
    if isinstance(value, (list, tuple)):
        return next((why for item in value if (why := flaw(item)) is not None), None)
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):  # how Python stores bytes that are not UTF-8
            return "it is not UTF-8 text"
        return f"it has {len(value):,} characters, more than {LONGEST:,}" if len(value) > LONGEST else None
    if isinstance(value, (int, float)):
        if not isinstance(value, int) and not isfinite(value):
            return "it is not a finite number"
        if abs(value) > LARGEST:
            return f"its absolute value is above {LARGEST:.2g}, the largest number of float32"
    return None


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`, both included unless `open_low` excludes `low`.

    >>> str(Interval(0, open_low=True)), str(Interval(0)), str(Interval(0, 1, open_low=True))
    ('above 0', '0 or more', 'between 0 and 1, not 0')
    """

    low: float = -inf
    high: float = inf
    open_low: bool = False

    def holds(self, number: Any) -> bool:
        """Return whether a value is a finite number within the interval.

        >>> Interval(0, 1).holds(0), Interval(0, 1, open_low=True).holds(0), Interval(0).holds(float("nan"))
        (True, False, False)
        """
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
Count = Annotated[int, Interval(1, 10**9)]  # torch accepts these as sizes
Natural = Annotated[int, Interval(0)]


def is_allowed(value: object, kind: Any) -> bool:
    """Return whether a value matches a type: int, float, str, bool, None, Literal, Annotated[number, Interval], a
    union, a sequence of one type, or a class. An integer is also a float; a boolean is never a number.

    >>> is_allowed(2, Positive), is_allowed(0, Positive), is_allowed(True, int)
    (True, False, False)
    >>> is_allowed("relu", Literal["relu", "tanh"]), is_allowed([1, 2], list[int]), is_allowed(None, int | None)
    (True, True, True)
    """
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
    """Describe the values that a type allows, in words for an error message.

    >>> describe(Positive), describe(Literal["relu", "tanh"]), describe(int | None), describe(list[str])
    ('a number above 0', 'relu or tanh', 'a whole number or null', 'a list, each item a word')
    """
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
