"""Errors that are not bugs: each has one message for the user and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches

ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), " Make room, or write elsewhere (runs_dir=FOLDER)."),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), " Change the permissions, or write elsewhere (runs_dir=FOLDER)."
    ),
}


class UserError(Exception):
    """A mistake in the user's input. The message says what was given, what is allowed and what to type. Exit code 2."""

    exit_code = 2


class Failure(UserError):
    """A valid command that could not be carried out, for example on a full disk. Exit code 1."""

    exit_code = 1


class Stopped(Failure):
    """A run that had to stop early. It is saved and resumes from its checkpoint. Exit code 1."""


def is_failure(kind: type[BaseException]) -> bool:
    """Return whether a run that ended with this type of exception has failed, rather than been interrupted."""
    return issubclass(kind, Exception) and not issubclass(kind, Stopped)


def explain(error: BaseException) -> tuple[str, int]:
    """Return the message to print for an error, and the exit code.

    >>> explain(UserError("latent=0 is not allowed."))
    ('latent=0 is not allowed.', 2)
    >>> explain(ZeroDivisionError("division by zero"))
    ('ZeroDivisionError: division by zero', 1)
    """
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}.{ADVICE.get(error.errno or 0, '')}", 1
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text}", 1


def visible(text: str) -> str:
    r"""Return a text with its control characters escaped, so that an untrusted name cannot control the terminal.

    Newlines and tabs are kept.

    >>> visible("a \x1b[2J b")
    'a \\x1b[2J b'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'X'?" for the allowed word most like the given one, or "" if none is similar.

    >>> nearest("latnet", ["latent", "epochs"])
    " Did you mean 'latent'?"
    >>> nearest("xyz", ["latent", "epochs"])
    ''
    """
    matches = get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty.

    >>> first_line(RuntimeError("no compiler found\\nsearched: ..."))
    'no compiler found'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
