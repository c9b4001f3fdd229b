"""Formatting of numbers, paths and lists for people to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

MINUS = "\N{MINUS SIGN}"  # as wide as a plus, and no line breaks after it


def time_left(seconds: float | None) -> str:
    """Return a remaining time in words, or an empty string if it is unknown.

    >>> time_left(7200), time_left(90), time_left(5), time_left(None)
    ('2.0 h left', '2 min left', 'less than a minute left', '')
    """
    if seconds is None:
        return ""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h left"
    return f"{seconds / 60:.0f} min left" if seconds >= 60 else "less than a minute left"


def relative(path: Path) -> Path:
    """Return a path as the user would type it in the current folder."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path


def digits_for(values: Sequence[float]) -> int:
    """Return how many decimals to print for numbers that are shown together.

    >>> digits_for([1234.5, 2.0]), digits_for([2.0]), digits_for([0.5]), digits_for([0.001])
    (0, 2, 3, 4)
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest >= 1000:
        return 0
    if largest >= 100:
        return 1
    if largest >= 1:
        return 2
    return 3 if largest >= 0.02 else 4


def number(value: float, digits: int | None = None) -> str:
    """Format a number with a true minus sign and `digits` decimals; by default, their number depends on its size.

    >>> number(3.14159), number(0.5), number(-0.0001, 2)
    ('3.14', '0.500', '0.00')
    """
    text = f"{value:.{digits_for([value]) if digits is None else digits}f}"
    if float(text) == 0:
        text = f"{value:.2g}" if value and digits is None else text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float, digits: int) -> str:
    """Format a number with its sign (+ or minus); zero gets no sign.

    >>> signed(2.5, 1), signed(0.001, 1)
    ('+2.5', '0.0')
    """
    text = number(value, digits)
    return text if text.startswith(MINUS) or not text.strip("0.") else f"+{text}"


def listed(words: Sequence[str]) -> str:
    """Join words with commas and "and", for a sentence.

    >>> listed(["a", "b", "c"]), listed(["a"])
    ('a, b and c', 'a')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def quoted(labels: Sequence[str]) -> str:
    """Quote each label, and join them with commas and "and", for a sentence.

    >>> quoted(["a", "b", "c"])
    "'a', 'b' and 'c'"
    """
    return listed([f"'{label}'" for label in labels])


def capitalized(text: str) -> str:
    """Return a text with a capital first letter; the other letters stay as they are.

    >>> capitalized("the ELBO")
    'The ELBO'
    """
    return text[:1].upper() + text[1:]
