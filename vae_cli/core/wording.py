"""Words and numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path


def time_left(seconds: float | None) -> str:
    """A number of seconds as a person says it."""
    if seconds is None:
        return ""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h left"
    return f"{seconds / 60:.0f} min left" if seconds >= 60 else "less than a minute left"


def relative(path: Path) -> Path:
    """A path as the user would type it from here."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path


MINUS = "\N{MINUS SIGN}"  # as wide as a plus, and no line breaks after it


# Words and numbers.


def digits_for(values: Sequence[float]) -> int:
    """Decimals for numbers that are set side by side."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest >= 1000:
        return 0
    if largest >= 100:
        return 1
    if largest >= 1:
        return 2
    return 3 if largest >= 0.02 else 4


def number(value: float, digits: int | None = None) -> str:
    """A number as it is printed, with a minus sign that is one."""
    text = f"{value:.{digits_for([value]) if digits is None else digits}f}"
    if float(text) == 0:
        text = f"{value:.2g}" if value and digits is None else text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float, digits: int) -> str:
    text = number(value, digits)
    return text if text.startswith(MINUS) or not text.strip("0.") else f"+{text}"


def quoted(labels: Sequence[str]) -> str:
    """Arms in a sentence: 'a', 'b' and 'c'."""
    words = [f"'{label}'" for label in labels]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
