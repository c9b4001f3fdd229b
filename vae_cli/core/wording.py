"""Words and numbers as a person reads them."""

from __future__ import annotations

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
