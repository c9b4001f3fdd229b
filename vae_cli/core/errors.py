"""What goes wrong through no fault of this program, as one message and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something that was given cannot be used: what was given, what is allowed, what to type instead. Exit code 2."""

    exit_code = 2


class Failure(UserError):
    """A command that was well put could not be carried out: a full disk, a diverged run. Exit code 1."""

    exit_code = 1


class Stopped(Failure):
    """A run had to stop before its end; it is saved, and goes on where it stands. Exit code 1."""


def is_failure(kind: type[BaseException]) -> bool:
    """Whether a run that ended by it has failed, and was not merely interrupted."""
    return issubclass(kind, Exception) and not issubclass(kind, Stopped)


def explain(error: BaseException) -> tuple[str, int]:
    """One message for whatever has gone wrong, and the exit code."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
        return f"{where}{error.strerror}.{' Make room, or write elsewhere (runs_dir=FOLDER).' if full else ''}", 1
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text}", 1


def visible(text: str) -> str:
    """A text in which what would steer a terminal is spelt out: a name that somebody else gave can hold anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'X'?" for the allowed word nearest to the one given, or nothing where none is near."""
    matches = get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def first_line(error: BaseException) -> str:
    """What another program's error says in its first line, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
