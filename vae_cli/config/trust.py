"""The user's own modules whose classes a configuration may use, because the user trusts them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


def trusted() -> tuple[str, ...]:
    """Return the modules that the user trusts, given to `trusting` or listed in the environment variable VAE_TRUST.

    The flag --trust sets VAE_TRUST, and worker processes inherit it.
    """
    return (*_trusted_here.get(), *os.environ.get("VAE_TRUST", "").replace(",", " ").split())


def in_shell(path: object) -> str:
    """Return a run's path for use in a command, with the --trust flags that its classes need.

    >>> in_shell("runs/my run")
    "'runs/my run'"
    """
    return " ".join([shlex.quote(str(path)), *(f"--trust {shlex.quote(module)}" for module in trusted())])


_trusted_here: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


@contextmanager
def trusting(modules: Iterable[str]) -> Iterator[None]:
    """Also trust these modules inside the context, without changing the environment."""
    token = _trusted_here.set((*_trusted_here.get(), *modules))
    try:
        yield
    finally:
        _trusted_here.reset(token)
